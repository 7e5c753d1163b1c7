"""Chooses modules and rank for `target_modules: auto`: the best placement within a budget of decode overhead.

Placements within the budget are trained for a few steps; the one with the lowest validation loss is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import UsageError

from edgetune.bases import Base
from edgetune.common.digests import key_of
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.methods.lora import LoraOptions
from edgetune.objectives.example import Example
from edgetune.planning.records import AdapterPlan
from edgetune.recipe.model import Recipe
from edgetune.training.hardware import processes
from edgetune.training.job import TrainAll, TrainingJob
from edgetune.training.schedule import Schedule

from .cost import Placement, costs, placements

# A trial runs this share of the steps of the full training, within the limits below.
_SHARE = 0.1
_STEPS = (4, 30)
_VALIDATION_ROWS = 64


@dataclass(frozen=True)
class PlacementTrial:
    """A placement with its share of decode speed lost; `val_loss` is None if the placement was not trained."""

    placement: Placement
    cost: float
    val_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The trial as JSON values."""
        modules = self.placement.target_modules
        return {
            "target_modules": modules if isinstance(modules, str) else list(modules),
            "r": self.placement.r,
            "cost": round(self.cost, 4),
            "val_loss": self.val_loss,
        }


@dataclass(frozen=True)
class PlacementChoice:
    """The chosen placement, all that were tried, and the `source` of their costs; trials ran for `steps` steps each.

    `busy` is the reason why measured costs are unreliable, None if the machine was quiet.
    """

    chosen: PlacementTrial
    tried: Sequence[PlacementTrial]
    budget: float
    source: str
    steps: int
    busy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The choice as JSON values, with all placements that were tried."""
        return {
            **self.chosen.to_json(),
            "max_decode_overhead": self.budget,
            "costs": self.source,
            "busy": self.busy,
            "steps": self.steps,
            "tried": [item.to_json() for item in self.tried],
        }

    def table(self) -> list[str]:
        """A line for each set of modules, at the rank that was trained or else the cheapest rank."""
        lines = []
        for _, group in groupby(self.tried, lambda item: item.placement.target_modules):
            ranks = list(group)
            item = next((item for item in ranks if item in _contenders(self.tried, self.budget)), ranks[0])
            lines.append(f"  {item.placement.title:<16} rank {item.placement.r:<4} {self._summary(item)}")
        return lines

    def _summary(self, item: PlacementTrial) -> str:
        cost = f"decodes {item.cost:.1%} slower"
        if not _fits(item, self.budget):
            return f"{cost}: over the budget"
        loss = "" if item.val_loss is None else f", validation loss {item.val_loss:.3f} after {self.steps} steps"
        return f"{cost}{loss}{' <- chosen' if item == self.chosen else ''}"


def choose(
    job: TrainingJob[Example],
    plan: AdapterPlan,
    base: Base,
    recipe: Recipe,
    *,
    folder: Path,
    train_all: TrainAll,
    progress: Progress,
) -> PlacementChoice:
    """Choose the placement for a job with `target_modules: auto`; its options set the highest rank.

    Costs are kept in `folder` and trials by `train_all`, so the same call makes the same choice again. With several
    processes, the main process measures. UsageError names the cheapest placement if all exceed the budget.
    """
    options = job.options
    assert isinstance(options, LoraOptions)
    candidates, budget = placements(options.r), options.max_decode_overhead
    with processes().main_process_first():
        overheads = costs(candidates, plan, base, recipe, folder=folder, progress=progress)
    tried = [PlacementTrial(placement, overheads.by_placement[placement]) for placement in candidates]
    contenders = _contenders(tried, budget)
    if not contenders:
        raise _over_budget(job.name, tried, budget, overheads.source)
    steps = 0
    if len(contenders) > 1:
        steps = _steps(job)
        results = train_all([_trial(job, item.placement, steps) for item in contenders])
        losses = {item.placement: results[_name(job, item.placement)].val_loss for item in contenders}
        tried = [replace(item, val_loss=losses.get(item.placement)) for item in tried]
        contenders = [item for item in tried if item.val_loss is not None]
    best = min(contenders, key=lambda item: (item.val_loss or 0.0, item.cost))
    choice = PlacementChoice(best, tried, budget, overheads.source, steps, overheads.busy)
    progress.say(f"{job.name}: modules and rank for a decode overhead below {_percent(budget)}, {choice.source}")
    for line in choice.table():
        progress.say(line)
    if choice.busy is not None:
        remedy = f"delete {folder} and build again on a quiet machine, or set a device"
        progress.say(f"{job.name}: measured on a busy machine ({choice.busy}), so the choice may be wrong; {remedy}")
    return choice


def _fits(item: PlacementTrial, budget: float) -> bool:
    # Noise may hide the cost of an adapter, but each has one, so a budget of 0 allows none.
    return item.cost < budget


def _contenders(tried: Sequence[PlacementTrial], budget: float) -> list[PlacementTrial]:
    """For each set of modules, the highest rank within the budget: a lower rank can express nothing more."""
    highest = {item.placement.target_modules: item for item in tried if _fits(item, budget)}
    return list(highest.values())


def _over_budget(name: str, tried: Sequence[PlacementTrial], budget: float, source: str) -> UsageError:
    cheapest = min(tried, key=lambda item: item.cost)
    placement = f"{cheapest.placement.title} at rank {cheapest.placement.r}"
    message = (
        f"adapter {name!r} slows decoding by {_percent(budget)} or more with every placement; "
        f"the cheapest, {placement}, costs {cheapest.cost:.1%} ({source})"
    )
    enough = math.floor(cheapest.cost * 100) + 1
    return UsageError(message, f"set max_decode_overhead: {enough}% or more")


def _percent(share: float) -> str:
    return f"{share * 100:.3g}%"


def _steps(job: TrainingJob[Example]) -> int:
    whole = Schedule(len(job.train), job.training).steps
    min_steps, max_steps = _STEPS
    return min(whole, max(min_steps, min(max_steps, round(whole * _SHARE))))


def _name(job: TrainingJob[Example], placement: Placement) -> str:
    return f"{job.name}/{placement.key}"


def _trial(job: TrainingJob[Example], placement: Placement, steps: int) -> TrainingJob[Example]:
    """A training run of a few steps with its own complete schedule, validated once at its end."""
    assert isinstance(job.options, LoraOptions)
    options = job.options.placed(placement.target_modules, placement.r)
    training = job.training.model_copy(update={"max_steps": steps, "evals": 1, "patience": None})
    state = [job.key, options.model_dump(mode="json"), training.model_dump(mode="json"), _VALIDATION_ROWS]
    return replace(
        job,
        name=_name(job, placement),
        options=options,
        training=training,
        validation=spread(job.loss_rows, _VALIDATION_ROWS),
        key=key_of(state),
    )
