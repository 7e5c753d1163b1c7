"""Runs trials, each in a separate process with a log in its folder: one after the other here, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgetune.common.cluster import ClusterTask, connected
from edgetune.common.module_process import run_module, write_request
from edgetune.common.progress import Progress

from .figures import TrialResult, read_outcome
from .grid import Trial

_MODULE = "edgetune.comparison.trial"
_DEFAULT_CPUS = 1
"""Cores per trial on a cluster if the recipe does not set threads."""


def run_here(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on this machine; KeyboardInterrupt stops the running one after it saved its training."""
    for number, trial in enumerate(trials, 1):
        progress.say(f"trial {number} of {len(trials)}: {trial.name}")
        yield _run(trial, progress)


def _run(trial: Trial, progress: Progress) -> TrialResult:
    folder = write_request(Path(trial.folder), trial)
    _, reason = run_module(_MODULE, folder, lambda line: progress.say(f"{trial.name}: {line}"))
    return outcome_of(trial, reason)


def run_on_ray(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on the cluster at RAY_ADDRESS, or on a local one with this machine's cores.

    The machines must share the comparison's folder, the recipe and its data. A trial reserves as many cores as the
    recipe has threads, so that parallel trials do not slow each other down. Yields outcomes as trials finish. Raises
    IncompatibleError with the extra to install if Ray is missing.
    """
    by_name = {trial.name: trial for trial in trials}
    with connected() as cluster:
        tasks = [
            ClusterTask(
                name, _MODULE, write_request(Path(trial.folder), trial), trial.one_task.threads or _DEFAULT_CPUS
            )
            for name, trial in by_name.items()
        ]
        progress.say(f"{len(tasks)} trials queued on the cluster")
        for name, reason in cluster.run(tasks, progress):
            yield outcome_of(by_name[name], reason)


def outcome_of(trial: Trial, reason: str) -> TrialResult:
    """The outcome that the trial's process wrote, or that it failed for `reason`."""
    outcome = None if reason else read_outcome(Path(trial.folder), trial.key)
    return outcome or trial.without_figures("failed", reason or "it left no outcome")
