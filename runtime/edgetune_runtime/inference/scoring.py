"""Scores from logits: the probability of each label, and the negative log-likelihood of a text."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from edgetune_runtime.bundle import Scope
from edgetune_runtime.engines.base import log_total
from edgetune_runtime.errors import UsageError
from edgetune_runtime.serving.context import Context
from edgetune_runtime.text.sampling import softmax

from .confidence import LABEL, NOTHING, Curves, confidence, log_odds
from .label_search import LabelScores
from .routing.router import Route
from .similarity import Similarities

_ROWS = 64
"""Rows of logits per step; with a vocabulary of 150,000 a row takes 0.6 MB."""


@dataclass(frozen=True)
class Classification:
    """The most likely label, and the probability of each label that was computed; unpacks into these two.

    If not all were, these are the lowest probabilities that they can have. `log_odds` are the model's own for the
    likeliest label against any other text, so they are the same however many labels were computed. `is_out_of_scope`:
    the label is the one that the recipe has for texts that none of the others fits. Where the bundle has the adapter's
    training prompts, the prompt is compared with them, and `log_odds` are those of both together.
    `confidence` is the probability that the label is right, as that of an `Answer`; None for other labels than the
    adapter's. With `min_confidence`, `is_unsure` says whether it is lower, or not known. `route` is the router's choice
    where it chose the adapter.
    """

    label: str
    probabilities: dict[str, float]
    log_odds: float
    is_out_of_scope: bool = False
    confidence: float | None = None
    is_unsure: bool = False
    route: Route | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.label, self.probabilities))

    @property
    def unseen(self) -> float:
        """The highest probability that the labels without one can have together."""
        return max(0.0, 1.0 - math.fsum(self.probabilities.values()))

    @property
    def kind(self) -> str:
        """The kind of the answer; see `inference.confidence`."""
        return NOTHING if self.is_out_of_scope else LABEL


class NegativeLogLikelihood(NamedTuple):
    """The sum of the negative log-likelihoods of a text's tokens in nats, and the number of these tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean per token."""
        return math.exp(self.nats / self.tokens)


def most_likely(
    labels: Sequence[str],
    scores: LabelScores,
    similarities: Similarities | None,
    *,
    scope: Scope | None,
    curves: Curves,
    min_confidence: float | None,
) -> Classification:
    """The label with the highest score, or that of `scope`, and the probability of each label with a score.

    `similarities` are those of the prompt to the adapter's training prompts, None where they are not compared.
    """
    scored = {label: value for label, value in zip(labels, scores.values, strict=True) if value is not None}
    shares = softmax(np.array([*scored.values(), scores.unseen])).tolist()
    # The last share is that of the others.
    probabilities = dict(zip(scored, shares, strict=False))
    label = max(scored, key=scored.__getitem__)
    result = Classification(label, probabilities, log_odds([scored[label]]))
    odds = result.log_odds
    if similarities is not None:
        result = replace(result, log_odds=similarities.label_log_odds(label, odds))
    if scope is not None:
        result = _in_scope(result, odds, scope, similarities)
    sure = confidence(curves, result.kind, result.log_odds)
    is_unsure = min_confidence is not None and (sure is None or sure < min_confidence)
    return replace(result, confidence=sure, is_unsure=is_unsure)


def check_labels(labels: Sequence[str]) -> None:
    """UsageError unless these are labels to choose from."""
    if (
        isinstance(labels, str)
        or not isinstance(labels, Collection)
        or not all(isinstance(label, str) for label in labels)
    ):
        raise UsageError(f"labels is {labels!r}", "give a list of texts")
    if not labels or len(set(labels)) != len(labels) or not all(labels):
        known = f"cannot classify with the labels {list(labels)}"
        remedy = "give labels that are unique and not empty, or an adapter that has labels"
        raise UsageError(known if labels else "there are no labels to choose from", remedy)


def _in_scope(
    result: Classification, log_odds: float, scope: Scope, similarities: Similarities | None
) -> Classification:
    """The result with the label of `scope` if the text is out of scope, and the log odds of this choice.

    `log_odds` are the model's own for its likeliest label.
    """
    is_likeliest = result.label == scope.label
    if similarities is None:
        odds = -log_odds if is_likeliest else log_odds
    else:
        # Beside the similarity, how sure the model is that a text is out of scope says little.
        odds = similarities.scope_log_odds(0.0 if is_likeliest else log_odds)
    if not is_likeliest and odds >= scope.threshold:
        return result
    # The search may have left it out.
    probabilities = {scope.label: 0.0, **result.probabilities}
    chosen = replace(result, label=scope.label, probabilities=probabilities)
    return replace(chosen, is_out_of_scope=True, log_odds=-odds)


def window_loss(context: Context, adapters: Mapping[str, float], tokens: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods (nats) of the tokens except the first."""
    loss, begin = 0.0, 1
    for rows in context.walk(adapters, tokens, _ROWS):
        # Nothing follows the last row.
        pairs = zip(rows, tokens[begin : begin + len(rows)], strict=False)
        loss += sum(log_total(row) - float(row[token]) for row, token in pairs)
        begin += len(rows)
    return loss
