"""The figures of a machine that determine the speed of decoding and prefill. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeedFigures:
    """What a machine sustains; a GB is 10^9 bytes, and a multiply-add counts as two operations.

    `layer_us` is the time of a layer per token in addition to reading its weights; `adapter_module_us` is the time per
    token that one adapted module adds. `kv_gb_per_s` is the rate at which attention reads keys and values.
    """

    bandwidth_gb_per_s: float
    compute_gflop_per_s: float
    layer_us: float
    adapter_module_us: float
    kv_gb_per_s: float
