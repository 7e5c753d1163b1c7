"""Runs trials as tasks on a Ray cluster, with the same processes as `process.run_here`.

The machines must share the comparison's folder, the recipe and its data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.wording import shortened

from edgetune.progress import Progress

from .figures import TrialResult
from .grid import Trial
from .process import failed, run_process

DEFAULT_CPUS = 1
"""Cores per trial if the recipe does not set threads."""


def run_on_ray(trials: Sequence[Trial], progress: Progress) -> Iterator[TrialResult]:
    """Run the trials on the cluster at RAY_ADDRESS, or on a local one with this machine's cores.

    A trial reserves as many cores as the recipe has threads, so that parallel trials do not slow each other down.
    Yields outcomes as trials finish. Raises IncompatibleError with the extra to install if Ray is missing.
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
        progress.say(f"{len(running)} trials queued on the cluster")
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                yield failed(trial, shortened(str(error)))
    finally:
        if started:
            ray.shutdown()


def _run(trial: Trial) -> TrialResult:
    return run_process(trial, lambda _: None)
