"""The first steps of a training, to measure the speed of this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgetune.methods.common.peft import ALL_LINEAR
from edgetune.methods.lora import LoraOptions
from edgetune.training.duration import TRIAL_STEPS
from edgetune.training.job import TrainingJob


def short_job(job: TrainingJob[Any]) -> TrainingJob[Any]:
    """The first steps of a training, to measure its speed."""
    options = job.options
    if isinstance(options, LoraOptions) and options.is_auto:
        options = options.placed(ALL_LINEAR, options.r)
    training = job.training.model_copy(update={"max_steps": TRIAL_STEPS, "evals": 1, "patience": None})
    return replace(job, options=options, training=training, validation=job.validation[:1])
