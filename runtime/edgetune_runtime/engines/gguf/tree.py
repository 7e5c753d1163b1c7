"""Continuations of one sequence as a tree whose shared beginnings are computed once, and their log probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from edgetune_runtime.engines.base import Logits, log_total

Continuation = tuple[int, ...]


def groups(wanted: Sequence[Continuation], branches: int, free: int) -> Iterator[list[Continuation]]:
    """Split sorted continuations so that each group has at most so many, whose tokens fit in the free cells."""
    group: list[Continuation] = []
    for tokens in wanted:
        if group and (len(group) == branches or sum(map(len, group)) + len(tokens) > free):
            yield group
            group = []
        group.append(tokens)
    if group:
        yield group


class ContinuationTree:
    """The tree of a group of continuations.

    A node is a beginning that has to be computed; `branches` are the numbers of the continuations that it is part of.
    The last token of a continuation is only looked up, so only what lies before it is a node.
    """

    def __init__(self, group: Sequence[Continuation]) -> None:
        self._group = group
        self.branches: dict[Continuation, list[int]] = {}
        for number, tokens in enumerate(group):
            for end in range(1, len(tokens)):
                self.branches.setdefault(tokens[:end], []).append(number)
        self.nodes = sorted(self.branches, key=len)
        self._following: dict[Continuation, set[int]] = {}
        for tokens in group:
            for end, token in enumerate(tokens):
                self._following.setdefault(tokens[:end], set()).add(token)

    def steps_after(self, nodes: Sequence[Continuation], rows: Logits) -> dict[Continuation, float]:
        """Log probability of the last token of each step, from the logits after the node that it continues."""
        steps = {}
        # Row by row: all rows at once in float64 would take more memory than a small base.
        for node, row in zip(nodes, rows, strict=True):
            total = log_total(row)
            steps.update({(*node, token): float(row[token]) - total for token in self._following[node]})
        return steps

    def totals(self, steps: dict[Continuation, float]) -> dict[Continuation, float]:
        """Log probability of each continuation, of those of its steps."""
        return {tokens: math.fsum(steps[tokens[: end + 1]] for end in range(len(tokens))) for tokens in self._group}
