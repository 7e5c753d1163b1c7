"""Finds the most likely of several labels by a best-first search of the tree of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from edgetune_runtime.engines.base import Logits, check_continuations, log_total
from edgetune_runtime.serving.context import Context
from edgetune_runtime.states.cache import common_prefix

Path = tuple[int, ...]
"""The tokens of a label, with the one that ends it, or the first of them."""


@dataclass(frozen=True)
class LabelScores:
    """The log probability (nats) of each label after the prompt; None for labels that were not computed.

    Together, those have at most the log probability `unseen`.
    """

    values: Sequence[float | None]
    unseen: float = -math.inf


class LabelTree:
    """The prefixes of labels whose probability is known, most probable first, without those that were continued.

    No token is more probable than 1, and labels exclude each other. So a prefix is at least as probable as all labels
    that begin with it together: once the most probable prefix is a whole label, no other label is more probable.
    """

    def __init__(self, labels: Sequence[Path], logits: Logits, expected: Mapping[Path, float]) -> None:
        """`logits` are those after the prompt. Labels with a higher value in `expected` are tried first."""
        self._labels = set(labels)
        self._following: dict[Path, set[int]] = {}
        for label in labels:
            for end, token in enumerate(label):
                self._following.setdefault(label[:end], set()).add(token)
        # The token to follow a prefix with, before the logits after the prefix are known.
        self._guesses = {path: token for path, (token, *others) in self._following.items() if not others}
        for label in sorted(expected, key=expected.__getitem__):
            self._guesses |= {label[:end]: token for end, token in enumerate(label)}
        # Each with its negative log probability.
        self._prefixes: list[tuple[float, Path]] = [(0.0, ())]
        self.add(logits[None])

    @property
    def size(self) -> int:
        """The number of tokens to decode until the probability of every label is known."""
        return len(self._following) - 1

    @property
    def is_decided(self) -> bool:
        """Whether no other label can be more probable than the best of those that are known."""
        return self._prefixes[0][1] in self._labels

    def next(self) -> tuple[Path, int]:
        """The most probable prefix with the tokens that are expected after it, and the number of rows for `add`."""
        prefix = path = self._prefixes[0][1]
        while path in self._guesses and (longer := (*path, self._guesses[path])) not in self._labels:
            path = longer
        return path, len(path) - len(prefix) + 1

    def add(self, rows: Logits) -> None:
        """Continue the most probable prefix with the logits after it and after each of the tokens of `next`."""
        nats, path = heappop(self._prefixes)
        for number, row in enumerate(rows, 1):
            total, guess = log_total(row), self._guesses.get(path) if number < len(rows) else None
            steps = {token: nats + max(0.0, total - float(row[token])) for token in self._following[path]}
            for token in steps.keys() - {guess}:
                heappush(self._prefixes, (steps[token], (*path, token)))
            if guess is not None:
                nats, path = steps[guess], (*path, guess)

    def known_scores(self) -> dict[Path, float]:
        """The log probability (nats) of each label that is known."""
        return {path: -nats for nats, path in self._prefixes if path in self._labels}

    def unseen(self) -> float:
        """The highest log probability (nats) that the other labels can have together."""
        return float(np.logaddexp.reduce([-nats for nats, path in self._prefixes if path in self._following]))


def score_labels(
    context: Context, logits: Logits, labels: Sequence[Path], expected: Mapping[Path, float], *, exact: bool = False
) -> LabelScores:
    """Score labels after the sequence, whose last `logits` are given, until the most likely one is known; or all.

    Labels with a higher value in `expected`, which may lack some, are tried first. It changes the time alone.

    A search that has cost as much as scoring all of them at once ends with the others at once.
    """
    check_continuations(labels, len(context.tokens), context.max_tokens, len(logits))
    if exact:
        return LabelScores(context.score(labels))
    tree = LabelTree(labels, logits, expected)
    _search(context, tree)
    scores = tree.known_scores()
    if tree.is_decided:
        return LabelScores([scores.get(label) for label in labels], tree.unseen())
    # Scoring needs the logits after the prompt, which are those of its last token.
    last = context.tokens[-1:]
    context.truncate(len(context.tokens) - 1)
    context.extend(last)
    others = [label for label in labels if label not in scores]
    scores |= zip(others, context.score(others), strict=True)
    return LabelScores([scores[label] for label in labels])


def _search(context: Context, tree: LabelTree) -> None:
    """Compute prefixes until the tree is decided, or until that has cost as much as all of them in one step."""
    start, path, cost = len(context.tokens), Path(), 0.0
    while not tree.is_decided and cost < context.batch_cost.of(tree.size):
        longer, rows = tree.next()
        kept = common_prefix(path, longer)
        context.truncate(start + kept)
        tree.add(context.extend(longer[kept:], last=rows))
        path, cost = longer, cost + context.batch_cost.of(len(longer) - kept)
    context.truncate(start)
