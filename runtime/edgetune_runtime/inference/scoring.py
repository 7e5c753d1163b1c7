"""Scores from logits: the probability of each label, and the negative log-likelihood of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgetune_runtime.engines.base import log_total
from edgetune_runtime.serving.context import Context
from edgetune_runtime.text.sampling import softmax

from .confidence import LABEL, Curves, confidence, log_odds_of_best

_ROWS = 64
"""Rows of logits per step; with a vocabulary of 150,000 a row takes 0.6 MB."""


class _Label(NamedTuple):
    label: str
    probabilities: dict[str, float]


class Classification(_Label):
    """The most likely label, and the probability of each label; unpacks into these two.

    `confidence` is the probability that the label is right, as that of an `Answer`. It is None for other labels than
    the adapter's. With `min_confidence`, `is_unsure` says whether it is lower, or not known.
    """

    confidence: float | None = None
    is_unsure: bool = False

    @property
    def log_odds(self) -> float:
        """The model's own log odds of the label against all others."""
        return log_odds_of_best(self.probabilities.values())


class NegativeLogLikelihood(NamedTuple):
    """The sum of the negative log-likelihoods of a text's tokens in nats, and the number of these tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean per token."""
        return math.exp(self.nats / self.tokens)


def most_likely(
    labels: Sequence[str], scores: Sequence[float], curves: Curves, min_confidence: float | None
) -> Classification:
    """The label with the highest score (a log probability, up to a constant), and the probability of each."""
    probabilities = dict(zip(labels, softmax(np.asarray(scores, np.float64)).tolist(), strict=True))
    found = Classification(max(probabilities, key=probabilities.__getitem__), probabilities)
    found.confidence = sure = confidence(curves, LABEL, found.log_odds)
    found.is_unsure = min_confidence is not None and (sure is None or sure < min_confidence)
    return found


def window_loss(context: Context, adapters: Mapping[str, float], tokens: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods (nats) of the tokens except the first."""
    loss, begin = 0.0, 1
    for rows in context.walk(adapters, tokens, _ROWS):
        # Nothing follows the last row.
        pairs = zip(rows, tokens[begin : begin + len(rows)], strict=False)
        loss += sum(log_total(row) - float(row[token]) for row, token in pairs)
        begin += len(rows)
    return loss
