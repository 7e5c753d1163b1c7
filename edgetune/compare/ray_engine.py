"""Trials in, their outcomes out as they come: the same processes as `process.run_here`, as tasks on a Ray cluster.

Its machines share the folder of the comparison, the recipe and its data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from edgetune_runtime.errors import IncompatibleError

from edgetune.progress import Progress

from .figures import TrialResult
from .grid import Trial
from .process import failed, run_process

DEFAULT_CPUS = 1
"""Processors of a trial where the recipe sets no threads."""


def run_on_ray(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on the cluster that RAY_ADDRESS names, or on one of this machine's processors.

    A trial takes as many processors as the recipe has threads, so that trials side by side do not slow each other.
    Raises IncompatibleError, with the extra to install, when there is no Ray.
    """
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise IncompatibleError("--engine ray needs Ray", 'run: pip install "edgetune[ray]"') from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        remote = ray.remote(_run)
        running = {}
        for trial in trials:
            cpus = trial.one_task.threads or DEFAULT_CPUS
            running[remote.options(num_cpus=cpus, name=trial.name, max_retries=0).remote(trial)] = trial
        progress.say(f"{len(running)} trials wait for a place on the cluster")
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                yield failed(trial, " ".join(str(error).split())[:300])
    finally:
        if started:
            ray.shutdown()


def _run(trial: Trial) -> TrialResult:
    return run_process(trial, lambda _: None)
