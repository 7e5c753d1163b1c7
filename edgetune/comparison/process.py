"""Runs trials one after the other, each in a separate process with a log in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgetune.module_process import run_module
from edgetune.progress import Progress

from .figures import TrialResult, read_outcome
from .grid import REQUEST_FILE, Trial

MODULE = "edgetune.comparison.trial"
"""The module that runs a trial in its folder."""


def run_here(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on this machine; KeyboardInterrupt stops the running one after it saved its training."""
    for number, trial in enumerate(trials, 1):
        progress.say(f"trial {number} of {len(trials)}: {trial.name}")
        _, reason = run_module(MODULE, write_request(trial), _with_name(trial.name, progress))
        yield outcome_of(trial, reason)


def write_request(trial: Trial) -> Path:
    """Write the trial for its process; returns its folder."""
    folder = Path(trial.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST_FILE).write_text(trial.to_json(), encoding="utf-8")
    return folder


def outcome_of(trial: Trial, reason: str) -> TrialResult:
    """The outcome that the trial's process wrote, or that it failed for `reason`."""
    outcome = None if reason else read_outcome(Path(trial.folder), trial.key)
    return outcome or failed(trial, reason or "it left no outcome")


def _with_name(name: str, progress: Progress) -> Callable[[str], None]:
    return lambda line: progress.say(f"{name}: {line}")


def failed(trial: Trial, reason: str) -> TrialResult:
    """The outcome of a trial that failed for `reason`."""
    return TrialResult(trial.name, trial.method, trial.rank, "failed", reason, refused=trial.refused)
