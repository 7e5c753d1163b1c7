"""Collects an importance matrix from the rows of a recipe: mean squares of the inputs of the base's linear modules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from edgetune_export.architectures.layout import Order, base_columns, name_map, tensor_of
from edgetune_export.architectures.shape import linear_modules
from edgetune_export.base_file.importance import Importance
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header

from edgetune import bases
from edgetune.bases import Base, ImportanceSource
from edgetune.common.digests import key_of
from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import Task, read_task

MAX_ROWS, MAX_TOKENS = 512, 16_384
"""What is read of the training rows of all adapters together."""


def requested_importance(recipe: Recipe, progress: Progress) -> ImportanceSource | None:
    """The importance matrix that the recipe asks for, if it does."""
    return None if recipe.imatrix is None else importance_source(recipe, progress)


def importance_source(recipe: Recipe, progress: Progress) -> ImportanceSource:
    """The importance matrix of the recipe's training rows; raises the errors of `read_task`."""
    tasks = [_sample(read_task(name, recipe), MAX_ROWS // len(recipe.adapters)) for name in recipe.adapters]
    state = [MAX_TOKENS, recipe.context_length, [task.spec.system for task in tasks]]
    key = key_of(state, ((row.prompt_key, row.completion) for task in tasks for row in task.train))
    return ImportanceSource(key, partial(_collect, tasks, recipe.context_length, progress))


def importance_of(recipe: Recipe, progress: Progress) -> Importance:
    """The importance matrix of the recipe's base as it is before quantization, whatever the recipe asks for.

    Raises UsageError for a task without quantization, and the errors of `bases.find`, `convert_folder` and `read_task`.
    """
    recipe.task_type.check_offers("imatrix", "imatrix")
    source = bases.find(recipe, download=True)
    assert source is not None
    with TemporaryDirectory() as folder:
        path = bases.before_quantization(source, Path(folder), progress, None)
        return importance_source(recipe, progress).collect(path)


def _sample(task: Task, count: int) -> Task:
    """The task with some of its training rows, without changed copies and validation rows."""
    rows = task.train if len(task.train) <= count else random.Random(0).sample(task.train, max(count, 1))
    return replace(task, train=rows, copies=(), validation=(), choosing=())


def _collect(tasks: Sequence[Task], max_tokens: int, progress: Progress, path: Path) -> Importance:
    """The matrix of the base in the file `path`."""
    header = read_header(path)
    with closing(GgufTokenizer(path)) as tokenizer:
        rows = [example.tokens for task in tasks for example in task.tokenize(tokenizer, max_tokens)[0]]
    random.Random(0).shuffle(rows)
    model = bases.load_torch(Base(path.name, path, "", header), torch.float32)
    sums, count = _hooked(model, header), 0
    with torch.inference_mode(), progress.step("importance matrix", len(rows)) as step:
        for row in rows:
            model(input_ids=torch.tensor([row]))
            count += len(row)
            step.update()
            if count >= MAX_TOKENS:
                break
    return Importance({name: (values / count).float().numpy() for name, values in sums.items()}, count)


def _hooked(model: Any, header: GgufHeader) -> dict[str, torch.Tensor]:  # noqa: ANN401 - transformers' class
    """Sums of squares by tensor, to which each forward pass of `model` adds from now on."""
    names, sums = name_map(header), dict[str, torch.Tensor]()
    for name, sized in linear_modules(header).items():
        tensor = tensor_of(name, header, names)
        total = sums.setdefault(tensor.name, torch.zeros(sized.columns, dtype=torch.float64))
        model.get_submodule(name).register_forward_pre_hook(partial(_add, total, base_columns(tensor, header)))
    # Logits of all tokens would take most of the time.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],))
    return sums


def _add(total: torch.Tensor, columns: Order | None, _: object, inputs: tuple[torch.Tensor, ...]) -> None:
    values = inputs[0][0].double().square().sum(0)
    total += values if columns is None else values[columns]
