"""Runs trials as tasks on a Ray cluster, with the same processes as `process.run_here`.

The machines must share the comparison's folder, the recipe and its data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgetune.common.cluster import ClusterTask, connected
from edgetune.common.module_process import write_request
from edgetune.common.progress import Progress

from .figures import TrialResult
from .grid import Trial
from .process import MODULE, outcome_of

DEFAULT_CPUS = 1
"""Cores per trial if the recipe does not set threads."""


def run_on_ray(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on the cluster at RAY_ADDRESS, or on a local one with this machine's cores.

    A trial reserves as many cores as the recipe has threads, so that parallel trials do not slow each other down.
    Yields outcomes as trials finish. Raises IncompatibleError with the extra to install if Ray is missing.
    """
    by_name = {trial.name: trial for trial in trials}
    with connected() as cluster:
        tasks = [
            ClusterTask(name, MODULE, write_request(Path(trial.folder), trial), trial.one_task.threads or DEFAULT_CPUS)
            for name, trial in by_name.items()
        ]
        progress.say(f"{len(tasks)} trials queued on the cluster")
        for name, reason in cluster.run(tasks, progress):
            yield outcome_of(by_name[name], reason)
