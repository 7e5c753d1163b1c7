"""Fits the curves of answers' confidence: how likely they are right, by the model's own log odds (Platt scaling).

Platt 1999, with Gaussian priors in place of his smoothed targets, so that a curve rises with the log odds even if no
answer was wrong. His target of right answers bounds the confidence (`edgetune_runtime/inference/confidence.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from edgetune_runtime.bundle import ConfidenceCurve
from edgetune_runtime.inference.confidence import confidence
from numpy.typing import NDArray

MIN_ROWS = 20
"""Answers of a kind that a curve needs."""
_FOLDS = 5
_BINS = 10
_PRIOR_MEAN = np.array([1.0, 0.0])
_PRIOR_PRECISION = np.diag([1.0, 0.25])
"""Gaussian prior of slope and offset: before any row is seen, a model is as sure as it should be."""
_STEPS, _PRECISION = 50, 1e-6
_DRAWS = 200
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Values of `min_confidence` at which bins begin, of which a curve knows the answers."""


class RatedAnswer(NamedTuple):
    """An answer to a row: its kind, the model's log odds for it, and whether it was right."""

    kind: str
    log_odds: float
    is_right: bool


class Bin(NamedTuple):
    """Answers of similar confidence: the mean of it, the share that was right, and how many they are."""

    confidence: float
    right: float
    rows: int


class Sure(NamedTuple):
    """The share of answers that reach a `min_confidence`, and the share of these that was wrong; None of none."""

    answers: float
    wrong: float | None


def fit_curves(answers: Sequence[RatedAnswer]) -> dict[str, ConfidenceCurve]:
    """A curve for each kind of answer that occurs; one without a slope for kinds of fewer than MIN_ROWS answers."""
    kinds = dict.fromkeys(answer.kind for answer in answers)
    return {kind: _curve([answer for answer in answers if answer.kind == kind]) for kind in kinds}


def bins_of(confidences: Sequence[float], right: Sequence[bool] | NDArray[np.bool_]) -> list[Bin]:
    """The answers by confidence, in tenths of the range from 0 to 1 that have any."""
    values, is_right = np.asarray(confidences, float), np.asarray(right, bool)
    tenths = np.minimum((values * _BINS).astype(int), _BINS - 1)
    chosen = [tenths == tenth for tenth in np.unique(tenths)]
    return [Bin(float(values[rows].mean()), float(is_right[rows].mean()), int(rows.sum())) for rows in chosen]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: the mean distance of confidence and share of right answers."""
    return sum(abs(each.confidence - each.right) * each.rows for each in bins) / sum(each.rows for each in bins)


def sure_from(curve: ConfidenceCurve, threshold: float) -> Sure:
    """What remains of a curve's answers with one of the THRESHOLDS as `min_confidence`."""
    bins = [Bin(confidence, right, int(rows)) for confidence, right, rows in curve.bins if confidence >= threshold]
    rows = sum(each.rows for each in bins)
    return Sure(rows / curve.rows, sum(each.rows * (1 - each.right) for each in bins) / rows if rows else None)


def error_if_exact(confidences: Sequence[float]) -> float:
    """The calibration error that as many answers have on average if each confidence is exactly right.

    With 10 answers in a bin, the share of right ones is some 0.1 from the mean confidence by chance alone.
    """
    values, draws = np.asarray(confidences), np.random.default_rng(0).random((_DRAWS, len(confidences)))
    return float(np.mean([calibration_error(bins_of(confidences, draw < values)) for draw in draws]))


def _curve(answers: Sequence[RatedAnswer]) -> ConfidenceCurve:
    right = [answer.is_right for answer in answers]
    if len(answers) < MIN_ROWS:
        return ConfidenceCurve(len(answers), _share(answers))
    left_out = _left_out(answers)
    bins = bins_of(left_out, right)
    return replace(
        _fitted(answers),
        error=round(calibration_error(bins), 4),
        error_if_exact=round(error_if_exact(left_out), 4),
        bins=tuple((round(each.confidence, 4), round(each.right, 4), each.rows) for each in bins),
    )


def _share(answers: Sequence[RatedAnswer]) -> float:
    return round(sum(answer.is_right for answer in answers) / len(answers), 4)


def _left_out(answers: Sequence[RatedAnswer]) -> list[float]:
    """The confidence of each answer by a curve that was fitted without it."""
    confidences = [0.0] * len(answers)
    for fold in range(_FOLDS):
        curve = _fitted([answer for number, answer in enumerate(answers) if number % _FOLDS != fold])
        for number in range(fold, len(answers), _FOLDS):
            answer = answers[number]
            confidences[number] = confidence({answer.kind: curve}, answer.kind, answer.log_odds) or 0.0
    return confidences


def _fitted(answers: Sequence[RatedAnswer]) -> ConfidenceCurve:
    """The curve with the slope (at least 0) and offset of the highest posterior probability, by Newton's method."""
    odds = np.array([[answer.log_odds, 1.0] for answer in answers])
    right = np.array([float(answer.is_right) for answer in answers])
    slope, offset = _maximum(odds, right).tolist()
    if slope < 0:
        # Surer answers were not right more often.
        slope, offset = 0.0, float(_maximum(odds * [0.0, 1.0], right)[1])
    return ConfidenceCurve(len(answers), _share(answers), round(slope, 4), round(offset, 4))


def _maximum(odds: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    def loss(values: NDArray[np.float64]) -> float:
        distance = values - _PRIOR_MEAN
        likelihood = np.logaddexp(0, odds @ values) - right * (odds @ values)
        return float(likelihood.sum() + distance @ _PRIOR_PRECISION @ distance / 2)

    values = _PRIOR_MEAN
    for _ in range(_STEPS):
        chances = np.exp(-np.logaddexp(0, -odds @ values))
        slopes = odds.T @ (chances - right) + _PRIOR_PRECISION @ (values - _PRIOR_MEAN)
        step = np.linalg.solve((odds.T * (chances * (1 - chances))) @ odds + _PRIOR_PRECISION, slopes)
        # Whole steps may overshoot.
        while loss(values - step) > loss(values) and np.abs(step).max() > _PRECISION:
            step /= 2
        values = values - step
        if np.abs(step).max() <= _PRECISION:
            break
    return values
