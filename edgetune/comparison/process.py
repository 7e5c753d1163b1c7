"""Runs trials one after the other, each in a separate process with a log in its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgetune_runtime.interrupts import end_on_interrupt
from edgetune_runtime.processes.child_process import ProcessResult

from edgetune.progress import Progress

from .figures import TrialResult, read_outcome
from .grid import REQUEST_FILE, Trial

LOG_FILE = "log.txt"
# Prefix of the error line that a failed trial prints.
_ERROR = "edgetune: "
# Time for a stopped trial to save its training.
_STOP_S = 60.0


def run_here(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on this machine; KeyboardInterrupt stops the running one after it saved its training."""
    for number, trial in enumerate(trials, 1):
        progress.say(f"trial {number} of {len(trials)}: {trial.name}")
        yield run_process(trial, progress.say)


def run_process(trial: Trial, say: Callable[[str], None]) -> TrialResult:
    """Run one trial and pass its progress to `say`. The outcome of a failed or killed trial gives the reason."""
    folder = Path(trial.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST_FILE).write_text(trial.to_json(), encoding="utf-8")
    errors: list[str] = []
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log, _started(folder, log.fileno()) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                log.write(line)
                log.flush()
                if line.startswith(_ERROR):
                    errors.append(line.removeprefix(_ERROR).strip())
                else:
                    say(f"{trial.name}: {line.rstrip()}")
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    outcome = read_outcome(folder, trial.key) if code == 0 else None
    return outcome or failed(trial, "; ".join(errors) or _ended(code))


def failed(trial: Trial, reason: str) -> TrialResult:
    """The outcome of a trial that failed for `reason`."""
    return TrialResult(trial.name, trial.method, trial.rank, "failed", reason, refused=trial.refused)


def end_with_parent() -> None:
    """Interrupt this process when its standard input closes, which also happens when the parent is killed."""

    def wait() -> None:
        # Not sys.stdin: this thread would still have its lock when the process exits.
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGINT)

    end_on_interrupt()
    threading.Thread(target=wait, daemon=True).start()


def _started(folder: Path, log: int) -> subprocess.Popen[str]:
    # In its own session it gets a terminal's interrupt only once, through this process.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "edgetune.comparison.trial", str(folder)],
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
