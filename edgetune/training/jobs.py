"""Runs training jobs: finished ones are skipped, and the base is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from edgetune.common.progress import Progress

from .duration import tokens_left
from .hardware import DTYPES, precision_of, processes, use_device
from .job import TrainingJob, TrainResult, finished
from .loop import train
from .plot import plot_training


def train_all(
    jobs: Sequence[TrainingJob[Any]],
    base: str,
    load: Callable[[torch.dtype], PreTrainedModel],
    work: Path,
    progress: Progress,
    *,
    plots: bool = True,
) -> dict[str, TrainResult]:
    """Run the jobs that are not finished in `work`; the result of each job by name.

    `base` is the base's name for messages; `load` is called only if a job is left to do.
    """
    results: dict[str, TrainResult] = {}
    model: PreTrainedModel | None = None
    found = {job.name: finished(work / job.name, job.key) for job in jobs}
    left = {job.name: job for job in jobs if found[job.name] is None}
    for job in jobs:
        folder = work / job.name
        result = found[job.name]
        left.pop(job.name, None)
        if result is None:
            use_device(job.training.device)
            # Updates of the base's own weights are too small for bf16.
            dtype = DTYPES["fp32" if job.method.trains_base else precision_of(job.training, job.method)]
            if model is None or dtype != model.dtype:
                progress.say(f"loading the base {base}")
                model = load(dtype)
            later = sum(tokens_left(o.train, o.loss_rows, o.training) for o in left.values())
            result = train(model, job, folder, progress, later)
            if job.method.trains_base:
                model = None
        # A process that ended right after a training has not plotted it.
        if plots and not (folder / "training.png").exists() and processes().is_main_process:
            plot_training(result, job.name, folder / "training.png", job.objective.unit)
        progress.say(_summary(job.name, result))
        results[job.name] = result
    return results


def _summary(name: str, result: TrainResult) -> str:
    turned = "" if result.overfit_step is None else f", overfitting after step {result.overfit_step}"
    share = result.trainable_parameters / result.total_parameters
    return (
        f"{name}: validation loss {result.val_loss:.3f} at step {result.shipped_step} of {result.steps}{turned}; "
        f"{result.trainable_parameters:,} trainable parameters ({share:.1%}), {result.tokens_per_s:.0f} tokens/s "
        f"in {result.precision} on {result.device}, peak memory so far {result.peak_memory_mb:.0f} MB"
    )
