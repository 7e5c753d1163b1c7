"""Exported graph and trained tasks in, agreement out: the runtime's engine against torch on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from edgetune_export.adapters.shapes import Floats
from edgetune_export.backends.onnx.encoder import mean_pooled
from edgetune_export.parity import divergence
from edgetune_runtime.engines.onnx.encoder import EncoderEngine
from edgetune_runtime.errors import VerificationError

from edgetune import methods
from edgetune.progress import Progress

from .objective import load_head, logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""Difference of a logit, where nothing is rounded: the graph adds in another order."""
TOLERANCE_KL = 0.01
"""Mean KL over the labels, nats a row, where weights are rounded; up to 1.1e-4 was measured (docs/encoders.md)."""
TOLERANCE_COSINE = 0.98
"""Cosine between the plain base's pooled layers, where weights are rounded; 0.999 was measured."""

# Rows of each task that the plain base is compared on.
_BASE_ROWS = 8


@dataclass(frozen=True)
class TrainedTask:
    """A task on its way into a bundle; `folder` holds PEFT's files and the head, `probes` held-out rows."""

    name: str
    folder: Path
    method: str
    options: methods.MethodOptions
    probes: Sequence[Sequence[int]]
    scale: float = 1.0
    dtype: str = "f32"

    def checkpoint(self, base: PreTrainedModel) -> methods.Checkpoint:
        """What was trained, with its base."""
        return methods.Checkpoint(self.name, self.folder, base, self.options, self.scale)


@dataclass(frozen=True)
class Agreement:
    """How far an exported task is from the trained one on `rows` rows.

    `kl` is the mean KL divergence over the labels in nats, `top1` the share of rows where both choose the same label,
    `difference` the largest of a logit.
    """

    kl: float
    top1: float
    difference: float
    rows: int


def verify(
    model: PreTrainedModel,
    tasks: Sequence[TrainedTask],
    graph: Path,
    files: Mapping[str, Path],
    *,
    int8: bool,
    progress: Progress,
) -> tuple[dict[str, Agreement], dict[str, float]]:
    """Compare each task, then each again after the others, then the plain base: agreement by task, figures of the base.

    `files` are the tasks' adapter files, `model` is the base in float32. Raises VerificationError that names the first
    task, or the base, that is not what was trained.
    """
    longest = max(len(row) for task in tasks for row in task.probes)
    found: dict[str, Agreement] = {}
    with closing(EncoderEngine(graph, context_length=longest)) as engine:
        first: dict[str, list[Floats]] = {}
        for task in tasks:
            engine.load_adapter(task.name, files[task.name])
            first[task.name] = _answers(engine, task)
            found[task.name] = _agreement(_trained(model, task), first[task.name])
            progress.say(f"  {task.name}: {_said(found[task.name])}")
            _check(found[task.name], task, rounded=int8 or task.dtype != "f32")
        for task in tasks:
            again = zip(first[task.name], _answers(engine, task), strict=True)
            if not all(np.array_equal(before, after) for before, after in again):
                message = f"task {task.name!r} answers otherwise after a switch to other tasks and back"
                raise VerificationError(message, "report this as a bug, with the recipe")
        base = _compare_base(model, tasks, engine)
        said = f"largest difference {base['difference']:.1e}, cosine {base['cosine']:.4f}"
        progress.say(f"  base after switching back: {said}")
        if not (base["cosine"] >= TOLERANCE_COSINE if int8 else base["difference"] <= TOLERANCE):
            message = f"the exported base is not the trained one: {said} of the pooled layer"
            raise VerificationError(message, "report this as a bug, with the recipe")
    return found, base


def _answers(engine: EncoderEngine, task: TrainedTask) -> list[Floats]:
    return [engine.logits(row, task.name, task.scale) for row in task.probes]


def _trained(model: PreTrainedModel, task: TrainedTask) -> list[Floats]:
    head = load_head(task.folder)
    with methods.load(task.method).loaded(task.checkpoint(model)) as peft:
        return _rows(task.probes, lambda tokens, mask: logits_of(peft, head, tokens, mask))


def _compare_base(model: PreTrainedModel, tasks: Sequence[TrainedTask], engine: EncoderEngine) -> dict[str, float]:
    """Largest difference of the pooled layer, and the least cosine between the two."""
    rows = [row for task in tasks for row in task.probes[:_BASE_ROWS]]

    def pooled(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mean_pooled(model(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)

    pairs = list(zip(_rows(rows, pooled), map(engine.pooled, rows), strict=True))
    return {
        "difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "cosine": min(float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairs),
        "rows": len(rows),
    }


def _rows(rows: Sequence[Sequence[int]], compute: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[Floats]:
    """What torch computes of each row alone."""
    with torch.inference_mode():
        inputs = [torch.tensor([list(row)]) for row in rows]
        return [compute(tokens, torch.ones_like(tokens))[0].float().numpy() for tokens in inputs]


def _agreement(expected: Sequence[Floats], found: Sequence[Floats]) -> Agreement:
    one, other = np.stack(expected), np.stack(found)
    if one.shape != other.shape:
        message = f"the trained head has {one.shape[1]} labels, the exported one {other.shape[1]}"
        raise VerificationError(message, "report this as a bug, with the recipe")
    return Agreement(
        kl=float(divergence(one, other).mean()),
        top1=float((one.argmax(-1) == other.argmax(-1)).mean()),
        difference=float(np.abs(one - other).max()),
        rows=len(one),
    )


def _check(agreement: Agreement, task: TrainedTask, *, rounded: bool) -> None:
    # Written so that NaN fails too.
    if not (agreement.kl <= TOLERANCE_KL if rounded else agreement.difference <= TOLERANCE):
        limit = f"a mean KL of {TOLERANCE_KL}" if rounded else f"a difference of {TOLERANCE}"
        message = f"task {task.name!r} is not what was trained: {_said(agreement)}; at most {limit} is expected"
        raise VerificationError(message, "write onnx: {weights: fp32}" if rounded else "report this as a bug")


def _said(agreement: Agreement) -> str:
    figures = f"mean KL {agreement.kl:.1e}, {agreement.top1:.1%} of labels agree"
    return f"{figures}, largest difference {agreement.difference:.1e}"
