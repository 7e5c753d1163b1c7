"""Runs a module on a folder in a process of its own, with a log there; it ends with the process that started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetune_runtime.processes.child_process import ProcessResult
from edgetune_runtime.processes.interrupts import end_on_interrupt

from .failure import PROGRAM

LOG_FILE, REQUEST_FILE = "log.txt", "request.json"
# Prefix of the error line that a failed module prints.
_ERROR = f"{PROGRAM}: "
# Time for a stopped module to save its training.
_STOP_S = 60.0


def run_module(module: str, folder: Path, say: Callable[[str], None]) -> tuple[int, str]:
    """Run `python -m MODULE FOLDER` and pass its progress to `say`; its exit code, and the reason if that is not 0."""
    errors: list[str] = []
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log, _started(module, folder, log.fileno()) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                log.write(line)
                log.flush()
                if line.startswith(_ERROR):
                    errors.append(line.removeprefix(_ERROR).strip())
                else:
                    say(line.rstrip())
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    return code, "" if code == 0 else "; ".join(errors) or _ended(code)


def write_request(folder: Path, request: Any) -> Path:  # noqa: ANN401 - a dataclass
    """Write the fields of a request, for a module that runs in `folder`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST_FILE).write_text(json.dumps(asdict(request), indent=2), encoding="utf-8")
    return folder


def read_request(folder: Path) -> dict[str, Any]:
    """The fields of the request in a folder."""
    values: dict[str, Any] = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    return values


def end_with_parent() -> None:
    """Interrupt this process when its standard input closes, which also happens when the parent is killed."""

    def wait() -> None:
        # Not sys.stdin: this thread would still have its lock when the process exits.
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGINT)

    end_on_interrupt()
    threading.Thread(target=wait, daemon=True).start()


def _started(module: str, folder: Path, log: int) -> subprocess.Popen[str]:
    # In its own session it gets a terminal's interrupt only once, through this process.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(folder)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={"PYTHONWARNINGS": "ignore", **os.environ},
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[str]) -> None:
    """Interrupt the process so that it saves and exits; kill it if it takes too long."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=_STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()


def _ended(code: int) -> str:
    hint = ", probably because the system ran out of memory" if code == -signal.SIGKILL else ""
    return f"it {ProcessResult(code, b'', b'').how}{hint}; see {LOG_FILE} in its folder"
