"""`edgetune-run doctor`: cores, memory, clock, load and libraries of this machine, and what slows answers down."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .bundle import Manifest
from .engines.gguf.ggml import cpu_backend
from .engines.gguf.llama import library
from .errors import IncompatibleError
from .threads.machine import ROOT, cores_left, cpu_quota, disturbance, free_mb, threads_for, throttling, usable_cores

_LIBRARIES = ("edgetune-runtime", "llama-cpp-python", "onnxruntime", "numpy", "tokenizers")
_CLOCK = "sys/devices/system/cpu/cpu0/cpufreq"


def examine(manifest: Manifest | None = None, root: Path = ROOT) -> dict[str, Any]:
    """What this process may use of the machine, as JSON values, and `problems`, one line each.

    With a bundle's manifest, also the number of threads that the bundle would use here. Loads llama.cpp, but no
    model.
    """
    quota = cpu_quota(root)
    found: dict[str, Any] = {
        "processor": _processor(root),
        "cores": {"machine": os.cpu_count(), "usable": cores_left(root), "quota": quota, "threads": usable_cores(root)},
        "free_mb": free_mb(root),
        "clock": _clock(root),
        "throttling": throttling(root),
        "busy": disturbance(root),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "llama_cpp": _llama_cpp(),
    }
    if manifest is not None:
        found["bundle"] = {"name": manifest.name, "threads": threads_for(manifest.threads, root)}
    return found | {"problems": list(_problems(found, manifest))}


def _problems(found: Mapping[str, Any], manifest: Manifest | None) -> Iterator[str]:
    quota, usable = found["cores"]["quota"], found["cores"]["usable"]
    if "error" in (found["llama_cpp"] or {}):
        yield str(found["llama_cpp"]["error"])
    if found["busy"]:
        yield f"{found['busy']}: answers take longer, and measurements are not representative"
    if quota is not None and quota < 1:
        yield f"a CPU quota of {quota:g} cores interrupts each step; set it to at least 1"
    if manifest is not None and manifest.threads and manifest.threads > usable:
        yield f"the bundle asks for {manifest.threads} threads, but only {usable} cores are available"
    governor = found["clock"].get("governor")
    if governor == "powersave" and found["processor"].startswith("ARM"):
        yield "the CPU frequency governor is powersave, which keeps the clock at its lowest; use ondemand"


def _processor(root: Path) -> str:
    """The processor's name; on ARM boards, which report none, the name of the board."""
    lines = (root / "proc/cpuinfo").read_text().splitlines() if (root / "proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "model\t"))]
    named = next((name for name in names if not name.isdigit()), "")
    is_arm = platform.machine() in ("aarch64", "arm64")
    return f"{'ARM, ' if is_arm else ''}{named or platform.processor() or platform.machine()}"


def _clock(root: Path) -> dict[str, Any]:
    """Frequency governor and MHz of the first core; empty where the system does not report them."""
    clock: dict[str, Any] = {}
    for key, name in (("governor", "scaling_governor"), ("mhz", "scaling_cur_freq"), ("most_mhz", "cpuinfo_max_freq")):
        path = root / _CLOCK / name
        if path.exists():
            text = path.read_text().strip()
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
