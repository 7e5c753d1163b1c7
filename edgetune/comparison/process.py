"""Runs trials one after the other, each in a separate process with a log in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgetune.common.module_process import run_module, write_request
from edgetune.common.progress import Progress

from .figures import TrialResult, read_outcome
from .grid import Trial

MODULE = "edgetune.comparison.trial"
"""The module that runs a trial in its folder."""


def run_here(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on this machine; KeyboardInterrupt stops the running one after it saved its training."""
    for number, trial in enumerate(trials, 1):
        progress.say(f"trial {number} of {len(trials)}: {trial.name}")
        yield _run(trial, progress)


def _run(trial: Trial, progress: Progress) -> TrialResult:
    folder = write_request(Path(trial.folder), trial)
    _, reason = run_module(MODULE, folder, lambda line: progress.say(f"{trial.name}: {line}"))
    return outcome_of(trial, reason)


def outcome_of(trial: Trial, reason: str) -> TrialResult:
    """The outcome that the trial's process wrote, or that it failed for `reason`."""
    outcome = None if reason else read_outcome(Path(trial.folder), trial.key)
    return outcome or trial.without_figures("failed", reason or "it left no outcome")
