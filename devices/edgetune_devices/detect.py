"""Writes the board file of the machine that it runs on: what the system reports, and a short measurement."""

from __future__ import annotations

import json
import platform
import struct
import time
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.inference.runtime import Runtime
from edgetune_runtime.sizing.calibration import figures_of, measure
from edgetune_runtime.sizing.figures import SpeedFigures
from edgetune_runtime.sizing.machine_speed import arithmetic, read_bandwidth
from edgetune_runtime.sizing.needs import needs_of_bundle
from edgetune_runtime.threads.machine import disturbance, free_mb, instructions, memory, processor, usable_cores
from edgetune_runtime.wording import printable

from . import boards

_ARCHITECTURES = {"x86_64": "x86-64", "AMD64": "x86-64", "aarch64": "armv8-a", "arm64": "armv8-a"}
_DECODE_SHARE = 0.7
"""What decoding sustains of the raw bandwidth: 0.69 on the Pi 5, 0.7 assumed for the Pi Zero 2 W."""
_QUANTIZED_SHARE = 0.5
"""Operations with quantized weights, as a share of float32 matrix products."""


def board_file(bundle: Path | None = None, engine: str | None = None) -> str:
    """The text of a board file for this machine; measures for a second, or a few seconds with a bundle.

    Memory is what this process can use: the free memory now, within the limits of its cgroups. UsageError on a system
    of 32 bits, EdgetuneError if the system does not report its memory, and the errors of opening the bundle.
    """
    architecture = _ARCHITECTURES.get(platform.machine())
    remedy = "use a 64-bit system on ARM (aarch64) or x86 (x86_64)"
    if architecture is None:
        raise UsageError(f"the processor is {platform.machine()}, which is not supported", remedy)
    # The machine is the kernel's: a 64-bit kernel may run a 32-bit system.
    if struct.calcsize("P") < 8:
        raise UsageError(f"this system has 32 bits on {platform.machine()}, which is not supported", remedy)
    total, free = memory().get("total_mb"), free_mb()
    if total is None or free is None:
        raise EdgetuneError("this system does not report its memory", "copy the file of a similar board instead")
    threads, busy = usable_cores(), disturbance()
    when = f"measured here on {time.strftime('%Y-%m-%d')}" + (f", while the machine was busy ({busy})" if busy else "")
    figures, sources = _measured(bundle, engine, threads, when)
    values: dict[str, Any] = {
        "title": processor(),
        "cores": threads,
        "instruction_sets": [architecture, *instructions()],
        "ram_mib": max(1, round(total * 1e6 / 2**20)),
        "ram_free_mib": max(1, int(min(free, total - 1) * 1e6 / 2**20)),
        "bandwidth_gb_per_s": round(figures.bandwidth_gb_per_s, 2),
        "compute_gflop_per_s": round(figures.compute_gflop_per_s, 1),
        "layer_us": round(figures.layer_us, 1),
        "adapter_module_us": round(figures.adapter_module_us, 2),
        "kv_gb_per_s": round(figures.kv_gb_per_s, 2),
        "storage": "not measured",
    }
    sources |= {
        "cores": f"{when}: the cores that this process may use for computing",
        "instruction_sets": "the system",
        "ram_mib": "the system",
        "ram_free_mib": f"{when}: free memory, within the limits of cgroups",
    }
    lines = ["# Written by `edgetune devices detect`.", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join([*lines, "", "[sources]", *(f"{key} = {_toml(sources[key])}" for key in sorted(sources)), ""])


def _measured(bundle: Path | None, engine: str | None, threads: int, when: str) -> tuple[SpeedFigures, dict[str, str]]:
    keys = ("bandwidth_gb_per_s", "compute_gflop_per_s", "layer_us", "adapter_module_us", "kv_gb_per_s")
    if bundle is not None:
        with Runtime.open(bundle, engine=engine, disk_mb=0, contexts=1) as runtime:
            needs = needs_of_bundle(bundle, engine=runtime.engine)
            figures = figures_of(needs, measure(runtime), runtime.threads)
            source = f"{when} with bundle {runtime.manifest.name} and engine {runtime.engine}"
        return figures, dict.fromkeys(keys, source)
    similar = boards.load("laptop" if platform.machine() in ("x86_64", "AMD64") else "pi-5")
    bandwidth, compute = read_bandwidth(threads) * _DECODE_SHARE, arithmetic(threads) * _QUANTIZED_SHARE
    raw = f"{when}: {_DECODE_SHARE:g} of what {threads} threads read from memory"
    products = f"{when}: {_QUANTIZED_SHARE:g} of float32 matrix products on {threads} threads"
    assumed = f"assumed: as for {similar.name}; give --bundle to measure it"
    figures = SpeedFigures(bandwidth, compute, similar.layer_us, similar.adapter_module_us, bandwidth)
    return figures, dict(zip(keys, (raw, products, assumed, assumed, raw), strict=True))


def _toml(value: object) -> str:
    """A value of TOML, which writes texts without control characters, numbers and lists of them as JSON does."""
    return printable(json.dumps(value, ensure_ascii=False))
