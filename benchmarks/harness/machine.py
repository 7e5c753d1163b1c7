"""What the results of a benchmark say about the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_machine() -> dict[str, Any]:
    """Processor, its kind (AVX-512 with bf16 or not), cores and Python's version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    kind = "AVX-512 bf16" if any("avx512_bf16" in line for line in lines) else "no bf16"
    return {"cpu": cpu, "kind": kind, "cores": os.cpu_count(), "python": platform.python_version()}


def said_of_machine(result: Mapping[str, Any]) -> str:
    """The machine of a result, and its threads if it has any, in words."""
    machine = result["machine"]
    threads = f"{result['threads']} threads, " if "threads" in result else ""
    return f"{threads}{machine['cpu']} ({machine['kind']})"
