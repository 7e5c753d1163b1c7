"""`edgetune-run doctor`: cores, memory, clock, load and libraries of this machine, and what slows answers down."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.engines.gguf.ggml import cpu_backend
from edgetune_runtime.engines.gguf.llama import library
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.threads.machine import (
    ROOT,
    cores_left,
    cpu_quota,
    disturbance,
    free_mb,
    instructions,
    memory,
    processor,
    read_text,
    threads_for,
    throttling,
    usable_cores,
)

_LIBRARIES = ("edgetune-runtime", "llama-cpp-python", "onnxruntime", "numpy", "tokenizers")
_CLOCK = "sys/devices/system/cpu/cpu0/cpufreq"
_HOT_C = 80
"""Raspberry Pi boards slow down from this temperature on."""


def examine(manifest: Manifest | None = None, root: Path = ROOT) -> dict[str, Any]:
    """What this process may use of the machine, as JSON values, and `problems`, one line each.

    With a bundle's manifest, also the number of threads that the bundle would use here. Loads llama.cpp, but no
    model.
    """
    quota = cpu_quota(root)
    facts: dict[str, Any] = {
        "processor": processor(root),
        "board": read_text(root / "proc/device-tree/model") or None,
        "system": {
            "machine": platform.machine(),
            "bits": 8 * struct.calcsize("P"),
            "python": platform.python_version(),
        },
        "instructions": instructions(root),
        "cores": {"machine": os.cpu_count(), "usable": cores_left(root), "quota": quota, "threads": usable_cores(root)},
        "free_mb": free_mb(root),
        "memory": memory(root),
        "clock": _clock(root),
        "temperature_c": _temperature(root),
        "throttling": throttling(root),
        "throttled_since_start": throttling(root, since_start=True),
        "busy": disturbance(root),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "llama_cpp": _llama_cpp(),
    }
    if manifest is not None:
        facts["bundle"] = {"name": manifest.name, "threads": threads_for(manifest.threads, root)}
    return facts | {"problems": list(_problems(facts, manifest))}


def _problems(facts: Mapping[str, Any], manifest: Manifest | None) -> Iterator[str]:
    quota, usable = facts["cores"]["quota"], facts["cores"]["usable"]
    if "error" in (facts["llama_cpp"] or {}):
        yield str(facts["llama_cpp"]["error"])
    if facts["system"]["bits"] < 64:
        yield "the system has 32 bits, and the engines need 64; install one, such as Raspberry Pi OS (64-bit)"
    if facts["busy"]:
        yield f"{facts['busy']}: answers take longer, and measurements are not representative"
    if facts["throttled_since_start"] and not facts["throttling"]:
        yield f"since the start there was: {facts['throttled_since_start']}; check power supply and cooling"
    if (facts["temperature_c"] or 0) >= _HOT_C:
        yield f"the processor has {facts['temperature_c']:.0f} °C and slows down; cool it"
    swapped = facts["memory"].get("swap_used_mb", 0.0)
    if swapped > facts["memory"].get("total_mb", 0.0) / 8:
        yield f"{swapped:.0f} MB of swap are in use: memory is short, and answers wait for the disk"
    if quota is not None and quota < 1:
        yield f"a CPU quota of {quota:g} cores interrupts each step; set it to at least 1"
    if manifest is not None and manifest.threads and manifest.threads > usable:
        yield f"the bundle asks for {manifest.threads} threads, but only {usable} cores are available"
    governor = facts["clock"].get("governor")
    if governor == "powersave" and facts["processor"].startswith("ARM"):
        yield "the CPU frequency governor is powersave, which keeps the clock at its lowest; use ondemand"


def _clock(root: Path) -> dict[str, Any]:
    """Frequency governor and MHz of the first core; empty where the system does not report them."""
    clock: dict[str, Any] = {}
    for key, name in (("governor", "scaling_governor"), ("mhz", "scaling_cur_freq"), ("most_mhz", "cpuinfo_max_freq")):
        text = read_text(root / _CLOCK / name)
        if text:
            clock[key] = int(text) / 1000 if text.isdigit() else text
    return clock


def _llama_cpp() -> dict[str, str] | None:
    """The variant of llama.cpp's CPU backend and the features that it uses, or why it cannot be loaded."""
    if _version("llama-cpp-python") is None:
        return None
    try:
        backend = cpu_backend(library())
    except IncompatibleError as error:
        return {"error": str(error)}
    return {"variant": backend.variant, "features": " ".join(backend.features)}


def _temperature(root: Path) -> float | None:
    """The highest temperature that a sensor of the processor reports, in °C."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    texts = [read_text(zone) for zone in zones]
    return max((int(text) / 1000 for text in texts if text.lstrip("-").isdigit()), default=None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
