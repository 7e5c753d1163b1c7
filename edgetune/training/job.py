"""A training job and its result: losses over time, speed and memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from edgetune_runtime.formats.atomic import TEMPORARY, swap_in
from edgetune_runtime.store.durable import flush_tree

from edgetune.common.files import write_file
from edgetune.common.spread import spread
from edgetune.methods import Method, MethodOptions
from edgetune.objectives.base import Objective, TrainingRow
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.recipe.training import TrainingSpec

R = TypeVar("R", bound=TrainingRow)
# Validation uses at most this many rows, so that validating on a large task does not cost more than training.
_LOSS_ROWS = 256


@dataclass(frozen=True)
class TrainingJob(Generic[R]):
    """One training run; `key` identifies everything that its result depends on.

    `rounds_to`: the base's file, if merged weights are rounded to its grid (see `rounded_layers`). `start`: the folder
    of the adapter that training starts from.
    """

    name: str
    method: Method[Any]
    options: MethodOptions
    training: TrainingSpec
    train: Sequence[R]
    validation: Sequence[R]
    key: str
    objective: Objective[Any] = NEXT_TOKEN
    rounds_to: Path | None = None
    start: Path | None = None

    @property
    def loss_rows(self) -> Sequence[R]:
        """The validation rows that the validation loss is the mean of: 256 of a weight above 0, spread over all."""
        return spread([row for row in self.validation if row.weight > 0], _LOSS_ROWS)


@dataclass
class Point:
    """One validation pass, after `step` steps; losses are means over the learned predictions by the weights of their
    rows, in nats."""

    step: int
    epoch: float
    train_loss: float
    val_loss: float
    learning_rate: float


@dataclass
class TrainResult:
    """The result of a training run; the losses are those of the checkpoint that ships, after `shipped_step` steps.

    `overfit_step` is the step after which validation loss rose, None if it did not. `total_parameters` are those of the
    base, without what the method adds.

    `device` is torch's name of the kind of device that the run ended on: cpu, cuda or mps.
    """

    train_loss: float
    val_loss: float
    shipped_step: int
    steps: int
    overfit_step: int | None
    trainable_parameters: int
    total_parameters: int
    tokens: int
    tokens_per_s: float
    peak_memory_mb: float
    seconds: float
    precision: str
    device: str
    history: list[Point] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """All fields except the history, as JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "history"}

    def curve(self) -> list[dict[str, float]]:
        """Step, training loss and validation loss of each validation pass, as JSON values."""
        return [{"step": p.step, "train_loss": p.train_loss, "val_loss": p.val_loss} for p in self.history]


TrainAll = Callable[[Sequence[TrainingJob[Any]]], Mapping[str, TrainResult]]
"""Trains all jobs and skips finished ones, like `training.jobs.train_all`."""


def finished(folder: Path, key: str | None = None) -> TrainResult | None:
    """The result in `folder` if its key is `key`, or with None of any key, else None."""
    try:
        raw = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if raw.pop("key") != key and key is not None:
            return None
        return TrainResult(**{**raw, "history": [Point(**point) for point in raw["history"]]})
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def write_result(folder: Path, key: str, result: TrainResult, save: Callable[[Path], None]) -> None:
    """Write the adapter, by `save`, the log and the result to the folder of a training, in place of an older result.

    `finished` never finds a result beside the adapter of another training.
    """
    temporary = folder / f".adapter{TEMPORARY}{os.getpid()}"
    try:
        save(temporary)
        flush_tree(temporary)
        for name in ("result.json", "training.png"):
            (folder / name).unlink(missing_ok=True)
        swap_in(temporary, folder / "adapter")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lines = [json.dumps(asdict(point)) for point in result.history]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_file(folder / "result.json", json.dumps({"key": key, **asdict(result)}))
