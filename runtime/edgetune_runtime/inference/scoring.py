"""Scores from logits: the probability of each label, and the negative log-likelihood of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgetune_runtime.engines.base import log_total
from edgetune_runtime.serving.context import Context
from edgetune_runtime.text.sampling import softmax

from .label_search import LabelScores

_ROWS = 64
"""Rows of logits per step; with a vocabulary of 150,000 a row takes 0.6 MB."""


class Classification(NamedTuple):
    """The most likely label, and the probability of each label that was computed.

    If not all were, these are the lowest probabilities that they can have.
    """

    label: str
    probabilities: dict[str, float]

    @property
    def unseen(self) -> float:
        """The highest probability that the labels without one can have together."""
        return max(0.0, 1.0 - math.fsum(self.probabilities.values()))


class NegativeLogLikelihood(NamedTuple):
    """The sum of the negative log-likelihoods of a text's tokens in nats, and the number of these tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean per token."""
        return math.exp(self.nats / self.tokens)


def most_likely(labels: Sequence[str], scores: LabelScores) -> Classification:
    """The label with the highest score, and the probability of each label with a score."""
    known = {label: value for label, value in zip(labels, scores.values, strict=True) if value is not None}
    shares = softmax(np.array([*known.values(), scores.unseen])).tolist()
    # The last share is that of the others.
    probabilities = dict(zip(known, shares, strict=False))
    return Classification(max(probabilities, key=probabilities.__getitem__), probabilities)


def window_loss(context: Context, adapters: Mapping[str, float], tokens: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods (nats) of the tokens except the first."""
    loss, begin = 0.0, 1
    for rows in context.walk(adapters, tokens, _ROWS):
        # Nothing follows the last row.
        pairs = zip(rows, tokens[begin : begin + len(rows)], strict=False)
        loss += sum(log_total(row) - float(row[token]) for row, token in pairs)
        begin += len(rows)
    return loss
