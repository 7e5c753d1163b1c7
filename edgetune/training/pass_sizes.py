"""Chooses the size of forward passes from the measured memory of a layer and the free memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator

from edgetune.objectives.base import TrainingRow, row_length
from edgetune.objectives.packing import MOST_KEYS
from edgetune.recipe.training import TrainingSpec

from .allocator import give_back_freed_memory, keep_freed_memory
from .checkpointing import layer_cost, layers_of, trained_layers
from .device_memory import free_mb, used_mb
from .memory import FREE_SHARE, PassCost, PassPlan, measured, plan_passes, state_mb


def pass_cost(
    rows: Sequence[TrainingRow],
    model: torch.nn.Module,
    loss_of: Callable[[TrainingRow], torch.Tensor],
    *,
    before: int,
    vocabulary: int,
) -> PassCost | None:
    """Measure what a pass of `model` keeps, from the loss of a short and a long row.

    `before` is the number of tokens that the method puts before each row. None if the model's layers are unknown.
    """
    layers = layers_of(model)
    if not layers:
        return None
    shortest = min(rows, key=row_length)
    # Up to so many keys, attention may keep a weight for each.
    measurable = (row for row in rows if row_length(row) + before <= MOST_KEYS)
    large = max(measurable, key=row_length, default=shortest)
    costs = [(row_length(row) + before, layer_cost(partial(loss_of, row), layers[-2:])) for row in (shortest, large)]
    cost = measured(*costs, layers=trained_layers(layers), vocabulary=vocabulary)
    return replace(cost, before=before)


def passes_within(
    cost: PassCost,
    training: TrainingSpec,
    rows: Sequence[TrainingRow],
    accelerator: Accelerator,
    *,
    trained: int,
    kept_bytes: int,
    name: str,
) -> PassPlan:
    """The largest passes that fit in the recipe's limit and the free memory, with `trained` parameters.

    `kept_bytes` are those that the objective will keep of the machine's memory.
    Also sets whether the process keeps freed memory. UsageError if the recipe's limit allows no pass.
    """
    device = accelerator.device
    # Return what the last training run kept, so that it counts as free.
    give_back_freed_memory()
    # A launcher's processes share the machine's memory; each has a GPU to itself.
    sharing = accelerator.num_processes if device.type == "cpu" else 1
    states = state_mb(trained) + (kept_bytes / 1e6 if device.type == "cpu" else 0)
    planned = plan_passes(
        cost,
        longest_row=max(map(row_length, rows)),
        batch_size=training.batch_size,
        used_mb=used_mb(device) + states,
        limit_mb=training.memory_mb,
        room_mb=free_mb(device) * FREE_SHARE / sharing - states,
        name=name,
    )
    (keep_freed_memory if planned.keeps_freed else give_back_freed_memory)()
    return planned
