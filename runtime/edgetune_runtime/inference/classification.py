"""Chooses a label: by the model, the adapter's training prompts, and the threshold for texts out of scope."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edgetune_runtime.bundle import AdapterEntry, Scope
from edgetune_runtime.decoding.single_flight import SingleFlightCache
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import UsageError
from edgetune_runtime.serving.classifier import Classifier
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.text.sampling import softmax

from .confidence import LABEL, NOTHING, Curves, confidence, log_odds
from .label_search import LabelScores, Path, score_labels
from .routing.router import Route
from .similarity import Similarities, TrainingPrompts

_REMEMBERED = 16
"""Adapters whose labels' tokens are remembered."""


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


@dataclass(frozen=True)
class LabelChoice:
    """How one of `labels` is chosen, whose tokens, with the one that ends each, are `paths`; an encoder has none.

    `prompts` are the adapter's training prompts. They say which label to try first, and with `is_compared` how
    sure it is. `scope` has the label of texts that none of the others fits. With `exact` all labels are computed.
    """

    labels: Sequence[str]
    paths: Sequence[Path] = ()
    scope: Scope | None = None
    prompts: TrainingPrompts | None = None
    is_compared: bool = False
    exact: bool = False

    def of(self, context: Context, logits: Logits, curves: Curves) -> Classification:
        """The label of the sequence in `context`, whose last `logits` are given; the sequence stays as it is."""
        similarities = None if self.prompts is None else self.prompts.similarities(logits)
        nearest = {} if similarities is None else similarities.nearest
        expected = {
            path: nearest[label] for label, path in zip(self.labels, self.paths, strict=True) if label in nearest
        }
        scores = score_labels(context, logits, self.paths, expected, exact=self.exact)
        return self.likeliest(scores, similarities if self.is_compared else None, curves)

    def likeliest(self, scores: LabelScores, similarities: Similarities | None, curves: Curves) -> Classification:
        """The label with the highest score, or that of the scope, and the probability of each label with a score.

        `similarities` are those of the prompt to the adapter's training prompts, None where they are not compared.
        """
        scored = {label: value for label, value in zip(self.labels, scores.values, strict=True) if value is not None}
        shares = softmax(np.array([*scored.values(), scores.unseen])).tolist()
        # The last share is that of the others.
        probabilities = dict(zip(scored, shares, strict=False))
        label = max(scored, key=scored.__getitem__)
        result = Classification(label, probabilities, log_odds([scored[label]]))
        odds = result.log_odds
        if similarities is not None:
            result = replace(result, log_odds=similarities.label_log_odds(label, odds))
        if self.scope is not None:
            result = _in_scope(result, odds, self.scope, similarities)
        return replace(result, confidence=confidence(curves, result.kind, result.log_odds))

    def path_of(self, label: str) -> Path:
        """The tokens of a label without the one that ends it."""
        return self.paths[self.labels.index(label)][:-1]


class LabelChoices:
    """Prepares choices of labels; remembers the tokens of the last adapters' own ones. Thread-safe.

    `running` computes them with the engine `engine`, and `prompts_of` gives the training prompts of an adapter, if the
    bundle has them.
    """

    def __init__(
        self,
        running: Pool | Classifier,
        engine: str,
        prompts_of: Callable[[AdapterEntry], TrainingPrompts | None],
    ) -> None:
        self._running, self._engine, self._prompts_of = running, engine, prompts_of
        self._paths: SingleFlightCache[Sequence[Path]] = SingleFlightCache(_REMEMBERED)

    def of(
        self, labels: Sequence[str], entry: AdapterEntry | None, *, is_alone: bool, exact: bool = False
    ) -> LabelChoice:
        """A choice of `labels` by an adapter, or by the base if `entry` is None.

        `is_alone`: no other adapter computes the prompt, and this one has its own scale. Else neither the threshold
        nor the training prompts tell anything.
        """
        if entry is None:
            return LabelChoice(labels, self._paths_of(labels), exact=exact)
        is_own = {*labels} == {*entry.labels}
        scope = entry.scope.get(self._engine) if is_alone else None
        if scope is not None and scope.label not in labels:
            scope = None
        is_compared = is_alone and (is_own or scope is not None)
        # Of some labels, training prompts only say which one to try first.
        tries = is_alone and not exact and not {*labels}.isdisjoint(entry.labels)
        prompts = self._prompts_of(entry) if is_compared or tries else None
        paths_of = partial(self._paths_of, labels)
        paths = self._paths.get(tuple(labels), paths_of) if is_own else paths_of()
        return LabelChoice(labels, paths, scope, prompts, is_compared, exact)

    def _paths_of(self, labels: Sequence[str]) -> Sequence[Path]:
        """The tokens of labels, each with the one that ends it; none for an encoder."""
        if not isinstance(self._running, Pool):
            return ()
        with self._running.tokenizer() as tokenizer:
            return [(*tokenizer.tokenize(label, continues=True), tokenizer.end_token) for label in labels]


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
