"""The figures of a trial, written as JSON, and the standard error of a score."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from edgetune.common.files import write_file
from edgetune.tasks.metrics import EITHER_RIGHT_OR_WRONG
from edgetune.training.job import TrainResult

LOWER_IS_BETTER = ("perplexity",)
"""Metrics for which lower is better."""

OUTCOME_FILE = "trial.json"

Status = Literal["done", "failed", "refused"]


@dataclass(frozen=True)
class EngineFigures:
    """The figures of a trial in one format, run by the device's engine.

    `bytes` is the size of the adapter's files, that of a full model if `shape` is merged. `tokens_per_s` is decoding
    with the unmerged adapter, `merged_tokens_per_s` with the adapter merged, `base_tokens_per_s` without an adapter.
    `switch_us` and `first_token_ms` (after a switch back) are medians. None where the shape has no such figure.
    `slow` means that the machine was busy or its processor throttled during the measurement; `busy` is the reason as
    text if it is known.
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
class BoardFit:
    """Whether the trial's bundle is predicted to fit on the recipe's board."""

    name: str
    fits: bool
    needed_mb: float
    available_mb: float


@dataclass(frozen=True)
class TrialResult:
    """One row of a comparison. If the trial is not `done`, `reason` says why in one line.

    `rows` is how many rows were scored, `trained_rows` the number of training rows.
    `torch_score` is the score of the checkpoint before export; `refused` maps formats to why they do not support the
    method. `placement` has what was tried for `target_modules: auto`, as from `PlacementChoice.to_json`.
    """

    name: str
    method: str
    rank: int | None
    status: Status
    reason: str = ""
    training: TrainResult | None = None
    metric: str = ""
    rows: int = 0
    torch_score: float | None = None
    engines: Mapping[str, EngineFigures] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    board: BoardFit | None = None
    placement: Mapping[str, Any] | None = None
    trained_rows: int = 0


def read_outcome(folder: Path, key: str) -> TrialResult | None:
    """The outcome in `folder` if it has this key, else None."""
    try:
        values = json.loads((folder / OUTCOME_FILE).read_text(encoding="utf-8"))
        return TypeAdapter(TrialResult).validate_python(values["outcome"]) if values["key"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_outcome(outcome: TrialResult, folder: Path, key: str) -> None:
    """Write the outcome of a trial with this key to `folder`."""
    write_file(folder / OUTCOME_FILE, json.dumps({"key": key, "outcome": asdict(outcome)}, indent=2))


def megabytes(size: int) -> str:
    """Bytes in MB (10^6 bytes), with enough digits to tell small adapters apart."""
    return f"{size / 1e6:.2f}" if size >= 100_000 else f"{size / 1e6:.4f}"


def goodness(metric: str, score: float) -> float:
    """The score as a number that is higher for a better score, for any metric."""
    return -score if metric in LOWER_IS_BETTER else score


def standard_error(metric: str, score: float, points: Sequence[float]) -> float:
    """Standard error of a mean score of rows or conversations with these points.

    Where each answer is right or wrong, or all points are 0 or 1, it is that with two right and two wrong answers more,
    as it would be 0 for a perfect score (Agresti and Coull 1998, "Approximate is better than 'exact' for interval
    estimation of binomial proportions"), and for conversations with the same mean. For perplexity, the points are each
    row's nats per token, and the error is that of their mean times the perplexity.
    One point alone shows no deviation; with one of 1 it tells no trials apart.
    """
    n, is_lower_better = len(points), metric in LOWER_IS_BETTER
    if metric in EITHER_RIGHT_OR_WRONG or (not is_lower_better and set(points) <= {0.0, 1.0}):
        return statistics.pstdev([*points, 0.0, 0.0, 1.0, 1.0]) / math.sqrt(n)
    error = (statistics.stdev(points) if n > 1 else 1.0) / math.sqrt(n)
    return score * error if is_lower_better else error
