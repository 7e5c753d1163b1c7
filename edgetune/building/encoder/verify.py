"""The parity check of encoders: compares the runtime's engine with torch on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from edgetune_export.adapters.shapes import Floats
from edgetune_export.parity import divergence
from edgetune_export.pooling import mean_pooled
from edgetune_runtime import engines
from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.engines.base import LabelEngine
from edgetune_runtime.errors import VerificationError
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.shipping.exported import ExportedFormat, Figures, ParityReport, TrainedAdapter

from .objective import load_head, logits_of

TOLERANCE = 1e-4
"""Maximum difference of a logit without quantization; the graph sums in another order."""
TOLERANCE_KL = 0.01
"""Maximum mean KL over the labels, in nats per row, with quantization; 1.1e-4 was measured (docs/encoders.md)."""
TOLERANCE_COSINE = 0.98
"""Minimum cosine between the plain base's pooled layers, with quantization; 0.999 was measured."""

# Rows per task for comparing the plain base.
_BASE_ROWS = 8


@dataclass(frozen=True)
class Agreement:
    """The difference between an exported task and the trained one on `rows` rows.

    `kl` is the mean KL divergence over the labels in nats, `top1` the share of rows where both choose the same label,
    `difference` the largest difference of a logit.
    """

    kl: float
    top1: float
    difference: float
    rows: int


def verify(
    model: PreTrainedModel, tasks: Sequence[TrainedAdapter], exports: Sequence[ExportedFormat], progress: Progress
) -> ParityReport:
    """Compare each task, then each again after the others, then the plain base, in every format.

    `model` is the base in float32. Raises VerificationError that names the first task, or the base, whose difference is
    too large.
    """
    longest = max(len(row) for task in tasks for row in task.probes)
    bases: dict[str, Figures] = {}
    by_format: dict[str, dict[str, Figures]] = {}
    for export in exports:
        rounded = export.weight_type != "f32"
        with _engine(export, longest) as engine:
            by_format[export.backend] = _compare_tasks(model, tasks, export, engine, progress, rounded=rounded)
            bases[export.backend] = _compare_base(model, tasks, engine, progress, rounded=rounded)
    return ParityReport(bases, by_format)


@contextmanager
def _engine(export: ExportedFormat, context_length: int) -> Iterator[LabelEngine]:
    make = engines.load(export.backend, CLASSIFICATION)
    assert not make.has_sequence
    with closing(make(export.base, context_length=context_length)) as engine:
        yield engine


def _compare_tasks(
    model: PreTrainedModel,
    tasks: Sequence[TrainedAdapter],
    export: ExportedFormat,
    engine: LabelEngine,
    progress: Progress,
    *,
    rounded: bool,
) -> dict[str, Figures]:
    """The agreement of each task; also checks that a switch to the others and back does not change its answers."""
    first: dict[str, list[Floats]] = {}
    agreements: dict[str, Figures] = {}
    for task in tasks:
        engine.load_adapter(task.name, export.adapters[task.name].file)
        first[task.name] = _answers(engine, task)
        agreement = _agreement(_trained(model, task), first[task.name])
        progress.say(f"  {task.name}: {_summary(agreement)}")
        _check(agreement, task, rounded=rounded or task.plan.dtypes[export.backend] != "f32")
        agreements[task.name] = asdict(agreement)
    for task in tasks:
        again = zip(first[task.name], _answers(engine, task), strict=True)
        if not all(np.array_equal(before, after) for before, after in again):
            message = f"task {task.name!r} answers differently after a switch to other tasks and back"
            raise VerificationError(message, "report this as a bug, with the recipe")
    return agreements


def _answers(engine: LabelEngine, task: TrainedAdapter) -> list[Floats]:
    return [engine.logits(row, task.name, task.plan.spec.scale) for row in task.probes]


def _trained(model: PreTrainedModel, task: TrainedAdapter) -> list[Floats]:
    head = load_head(task.folder)
    with methods.load(task.plan.method).loaded(task.checkpoint(model)) as peft:
        return _rows(task.probes, lambda tokens, mask: logits_of(peft, head, tokens, mask))


def _compare_base(
    model: PreTrainedModel,
    tasks: Sequence[TrainedAdapter],
    engine: LabelEngine,
    progress: Progress,
    *,
    rounded: bool,
) -> Figures:
    """The largest difference of the plain base's pooled layer, and the smallest cosine."""
    rows = [row for task in tasks for row in spread(task.probes, _BASE_ROWS)]

    def pooled(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mean_pooled(model(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)

    pairs = list(zip(_rows(rows, pooled), map(engine.pooled, rows), strict=True))
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    cosine = min(float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairs)
    summary = f"largest difference {difference:.1e}, cosine {cosine:.4f}"
    progress.say(f"  base after switching back: {summary}")
    if not (cosine >= TOLERANCE_COSINE if rounded else difference <= TOLERANCE):
        message = f"the exported base does not match the trained one: {summary} of the pooled layer"
        raise VerificationError(message, "report this as a bug, with the recipe")
    return {"difference": difference, "cosine": cosine, "rows": len(rows)}


def _rows(rows: Sequence[Sequence[int]], compute: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[Floats]:
    """The results of `compute` for each row."""
    with torch.inference_mode():
        inputs = [torch.tensor([list(row)]) for row in rows]
        return [compute(tokens, torch.ones_like(tokens))[0].float().numpy() for tokens in inputs]


def _agreement(trained: Sequence[Floats], exported: Sequence[Floats]) -> Agreement:
    expected, actual = np.stack(trained), np.stack(exported)
    if expected.shape != actual.shape:
        message = f"the trained head has {expected.shape[1]} labels, the exported one {actual.shape[1]}"
        raise VerificationError(message, "report this as a bug, with the recipe")
    return Agreement(
        kl=float(divergence(expected, actual).mean()),
        top1=float((expected.argmax(-1) == actual.argmax(-1)).mean()),
        difference=float(np.abs(expected - actual).max()),
        rows=len(expected),
    )


def _check(agreement: Agreement, task: TrainedAdapter, *, rounded: bool) -> None:
    # In this form NaN fails too.
    if not (agreement.kl <= TOLERANCE_KL if rounded else agreement.difference <= TOLERANCE):
        limit = f"a mean KL of {TOLERANCE_KL}" if rounded else f"a difference of {TOLERANCE}"
        message = (
            f"task {task.name!r} does not match the trained model: {_summary(agreement)}; at most {limit} is expected"
        )
        raise VerificationError(message, "write onnx: {weights: fp32}" if rounded else "report this as a bug")


def _summary(agreement: Agreement) -> str:
    figures = f"mean KL {agreement.kl:.1e}, {agreement.top1:.1%} of labels agree"
    return f"{figures}, largest difference {agreement.difference:.1e}"
