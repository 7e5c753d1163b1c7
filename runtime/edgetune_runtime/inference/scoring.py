"""The negative log-likelihood of a text, from logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgetune_runtime.engines.base import log_total
from edgetune_runtime.serving.context import Context

_ROWS = 64
"""Rows of logits per step; with a vocabulary of 150,000 a row takes 0.6 MB."""


class NegativeLogLikelihood(NamedTuple):
    """The sum of the negative log-likelihoods of a text's tokens in nats, and the number of these tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean per token."""
        return math.exp(self.nats / self.tokens)


def window_loss(context: Context, adapters: Mapping[str, float], tokens: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods (nats) of the tokens except the first."""
    loss, begin = 0.0, 1
    for rows in context.walk(adapters, tokens, _ROWS):
        # Nothing follows the last row.
        pairs = zip(rows, tokens[begin : begin + len(rows)], strict=False)
        loss += sum(log_total(row) - float(row[token]) for row, token in pairs)
        begin += len(rows)
    return loss
