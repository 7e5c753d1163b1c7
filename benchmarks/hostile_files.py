"""Opens changed copies of a bundle with `edgetune-run`, or `edgetune`, and records how the command ends."""

from __future__ import annotations

from benchmarks.harness.memory import status_mb
from benchmarks.harness.tables import progress

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.bundle import read_manifest

from benchmarks.hostile_server import MEMORY_MB, limit_process

LONGEST_S = 10.0
STATES = "states"
"""Folder of the saved states, beside the copy of the bundle."""
_OUTPUT_BYTES = 100_000


@dataclass(frozen=True)
class FileAttack:
    """A change of a copy of a bundle, and the command that opens it, of `edgetune_runtime` or another `program`.

    `must` is `refuse` or `open` if the command must do that; else it may do either, without any harm.
    """

    name: str
    item: str
    does: str
    change: Callable[[Path], object]
    words: Sequence[str] = ("generate", "BUNDLE", "--prompt", "hi", "--max-tokens", "4")
    engine: str = "gguf"
    must: str = ""
    program: str = "edgetune_runtime"
    longest_s: float = LONGEST_S


@dataclass(frozen=True)
class FileResult:
    """What the command did: its exit code (negative for a signal, None if it did not end), time, memory and errors."""

    name: str
    item: str
    does: str
    code: int | None
    seconds: float
    peak_mb: float
    error: str
    missed: Sequence[str]


def run_all(bundle: Path, attacks: Sequence[FileAttack], growth_mb: float) -> list[FileResult]:
    """The results of the attacks for whose engine the bundle has files; memory may grow by `growth_mb`."""
    engines = read_manifest(bundle).base.files
    attacks = [attack for attack in attacks if attack.engine in engines]
    unchanged = {
        engine: _run(bundle, FileAttack("unchanged", "", "nothing", lambda _: None, engine=engine), float("inf"))
        for engine in {attack.engine for attack in attacks}
    }
    results = list(unchanged.values())
    for attack in attacks:
        is_runtime = attack.program == "edgetune_runtime"
        most_mb = unchanged[attack.engine].peak_mb + growth_mb if is_runtime else MEMORY_MB
        results.append(_run(bundle, attack, most_mb))
        progress(f"{attack.name}: {', '.join(results[-1].missed) or 'ok'}")
    return results


def _run(bundle: Path, attack: FileAttack, most_mb: float) -> FileResult:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # Links, as a base may be large: a change replaces a file and never writes to it.
        copy = Path(shutil.copytree(bundle, work / "bundle", copy_function=_link))
        attack.change(copy)
        manifest = read_manifest(bundle)
        base = str(bundle / manifest.base.files[attack.engine])
        adapter = next(iter(manifest.adapters), "")
        values_by_name = {"BUNDLE": str(copy), "ADAPTER": adapter, "BASE": base, "WORK": folder}
        words = [_filled(word, values_by_name) for word in attack.words]
        if words[0] == "generate":
            words += ["--engine", attack.engine]
        command = [sys.executable, "-m", attack.program, *words]
        code, seconds, peak_mb, out, errors = _ended(command, work, attack.longest_s)
    lines = [line for line in errors.splitlines() if line.strip()]
    checks = {
        "hangs": code is None,
        "aborts": code is not None and code < 0,
        "slow": seconds > attack.longest_s,
        "lines": len(lines) > 1 or (bool(code) and not lines),
        "unexpected": "unexpected" in errors or "Traceback" in errors,
        "control characters": "\x1b" in out + errors,
        "memory": peak_mb > most_mb,
        "opened": attack.must == "refuse" and code == 0,
        "refused": attack.must == "open" and code not in (0, None),
    }
    missed = [what for what, is_missed in checks.items() if is_missed]
    error = (lines or [""])[-1][:300]
    return FileResult(attack.name, attack.item, attack.does, code, round(seconds, 2), round(peak_mb, 1), error, missed)


def _filled(word: str, values_by_name: Mapping[str, str]) -> str:
    for name, value in values_by_name.items():
        word = word.replace(name, value)
    return word


def _ended(command: Sequence[str], work: Path, longest_s: float) -> tuple[int | None, float, float, str, str]:
    """Run a command, or end it: its code, seconds, peak of memory in MB, output and errors."""
    environment = {**os.environ, "EDGETUNE_CACHE": str(work / STATES)}
    begin = time.monotonic()
    with (work / "out").open("w+b") as out, (work / "errors").open("w+b") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        limit_process(process.pid, MEMORY_MB)
        peak_mb = 0.0
        while process.poll() is None and time.monotonic() - begin < longest_s + 5:
            peak_mb = max(peak_mb, status_mb(process.pid, "VmHWM"))
            time.sleep(0.02)
        code = process.poll()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seconds = time.monotonic() - begin
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read(_OUTPUT_BYTES).decode("utf-8", "replace"))
    return code, seconds, peak_mb, texts[0], texts[1]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
