"""What one trial gave, as frozen figures that JSON holds; what a score may be off by."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgetune_runtime.atomic import replacing

LOWER_IS_BETTER = ("perplexity",)
"""Metrics of which less is better."""

OUTCOME_FILE = "trial.json"

Status = Literal["done", "failed", "refused"]


@dataclass(frozen=True)
class OnEngine:
    """A trial in one format, run by the engine that the device has.

    `bytes` are those of the adapter's files, a whole model where `shape` is merged. `tokens_per_s` is decoding with the
    adapter beside the base, `merged_tokens_per_s` with the adapter merged into it, `base_tokens_per_s` the plain base.
    `switch_us` and `first_token_ms` (after a switch back) are medians. None stands for what the shape cannot give.
    `slow` says that the machine was busy while these times and speeds were taken, or its processor throttled; `busy` is
    the reason in a few words, where it is known.
    """

    shape: str
    bytes: int
    score: float
    standard_error: float
    kl: float
    base_tokens_per_s: float
    tokens_per_s: float | None = None
    merged_tokens_per_s: float | None = None
    switch_us: float | None = None
    first_token_ms: float | None = None
    slow: bool = False
    busy: str | None = None


@dataclass(frozen=True)
class TrainingFigures:
    """What a training took and gave; losses are nats a token, `history` holds (epoch, training, validation loss)."""

    trainable_parameters: int
    total_parameters: int
    seconds: float
    tokens_per_s: float
    peak_memory_mb: float
    train_loss: float
    val_loss: float
    best_step: int
    steps: int
    overfit_step: int | None
    history: tuple[tuple[float, float, float], ...] = ()

    @property
    def trainable_share(self) -> float:
        """Share of the base's parameters."""
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True)
class OnBoard:
    """Whether the trial's bundle fits on the recipe's board, by prediction."""

    name: str
    fits: bool
    needed_mb: float
    available_mb: float


@dataclass(frozen=True)
class TrialResult:
    """One row of a comparison. Of a trial that is not `done`, `reason` says why in one line.

    `torch_score` is that of the checkpoint before export; `refused` maps a format to why it holds no such adapter.
    `placement` is what was tried for `target_modules: auto`, as `placement.Choice.to_json` gives it.
    """

    name: str
    method: str
    rank: int | None
    status: Status
    reason: str = ""
    training: TrainingFigures | None = None
    metric: str = ""
    rows: int = 0
    torch_score: float | None = None
    engines: Mapping[str, OnEngine] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    board: OnBoard | None = None
    placement: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> TrialResult:
        """What `to_json` gave; TypeError or KeyError for anything else."""
        training, board = values["training"], values["board"]
        if training is not None:
            training = TrainingFigures(**{**training, "history": tuple(map(tuple, training["history"]))})
        engines = {name: OnEngine(**figures) for name, figures in values["engines"].items()}
        board = None if board is None else OnBoard(**board)
        return cls(**{**values, "training": training, "engines": engines, "board": board})


def read_outcome(folder: Path, key: str) -> TrialResult | None:
    """The outcome that a trial of this key left in `folder`, else None."""
    try:
        values = json.loads((folder / OUTCOME_FILE).read_text(encoding="utf-8"))
        return TrialResult.of_json(values["outcome"]) if values["key"] == key else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def write_outcome(outcome: TrialResult, folder: Path, key: str) -> None:
    """Leave the outcome of a trial of this key in `folder`."""
    with replacing(folder / OUTCOME_FILE) as path:
        path.write_text(json.dumps({"key": key, "outcome": outcome.to_json()}, indent=2), encoding="utf-8")


def megabytes(size: int) -> str:
    """Bytes as 10^6 of them, with digits enough to tell small adapters apart."""
    return f"{size / 1e6:.2f}" if size >= 100_000 else f"{size / 1e6:.4f}"


def goodness(metric: str, score: float) -> float:
    """A number that is higher for a better score, whatever the metric."""
    return -score if metric in LOWER_IS_BETTER else score


def standard_error(metric: str, score: float, points: Sequence[float]) -> float:
    """One standard error of a mean score over rows that got these points: binomial where all are 0 or 1.

    Of a perplexity, whose points are nats a token of each row, that of its logarithm times the perplexity.
    """
    n = len(points)
    if n < 2:
        return 0.0
    if metric in LOWER_IS_BETTER:
        return score * statistics.stdev(points) / math.sqrt(n)
    if set(points) <= {0.0, 1.0}:
        mean = statistics.fmean(points)
        return math.sqrt(mean * (1 - mean) / n)
    return statistics.stdev(points) / math.sqrt(n)
