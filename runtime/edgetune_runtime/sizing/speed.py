"""Predicts decode and prefill speed from what a machine sustains. docs/boards.md compares it with measurements."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune_runtime.engines.needs import AdapterSize, Needs

from .figures import SpeedFigures


@dataclass(frozen=True)
class Speed:
    """Predicted tokens/s: decode with the base, decode with the slowest adapter, and prefill with the base."""

    decode_tokens_per_s: float
    adapter_tokens_per_s: float
    prefill_tokens_per_s: float


def speed_of(needs: Needs, figures: SpeedFigures) -> Speed:
    """The predicted speed with half the context filled."""
    seconds = token_seconds(needs, figures, needs.context_length // 2)
    slowest = max((adapter_seconds(size, figures) for size in needs.adapters.values()), default=0.0)
    return Speed(1 / seconds, 1 / (seconds + slowest), prefill_speed(needs, figures))


def prefill_speed(needs: Needs, figures: SpeedFigures) -> float:
    """Predicted tokens/s of a prompt; the output head counts once per batch, so it is left out."""
    return figures.compute_gflop_per_s * 1e9 / (2 * max(needs.read_parameters - needs.head_parameters, 1))


def token_seconds(needs: Needs, figures: SpeedFigures, tokens: int) -> float:
    """Seconds per token after `tokens` tokens: the longer of reading weights and computing, attention, and layers."""
    reading = needs.read_bytes / (figures.bandwidth_gb_per_s * 1e9)
    computing = 2 * needs.read_parameters / (figures.compute_gflop_per_s * 1e9)
    attention = needs.kv_bytes_per_token * tokens / (figures.kv_gb_per_s * 1e9)
    return max(reading, computing) + attention + needs.layers * figures.layer_us / 1e6


def adapter_seconds(size: AdapterSize, figures: SpeedFigures) -> float:
    """Seconds per token that an adapter adds."""
    return size.file_bytes / (figures.bandwidth_gb_per_s * 1e9) + size.modules * figures.adapter_module_us / 1e6
