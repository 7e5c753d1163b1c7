"""Score continuations of one sequence as a prefix tree, so that common prefixes are computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from edgetune_runtime.engines.base import Logits, log_total

Continuation = tuple[int, ...]


def groups(continuations: Sequence[Continuation], branches: int, free: int) -> Iterator[list[Continuation]]:
    """Split sorted continuations into groups of at most `branches` whose tokens fit in `free` KV cells."""
    group: list[Continuation] = []
    for tokens in continuations:
        if group and (len(group) == branches or sum(map(len, group)) + len(tokens) > free):
            yield group
            group = []
        group.append(tokens)
    if group:
        yield group


class ContinuationTree:
    """The prefix tree of a group of continuations.

    A node is a prefix that has to be computed; `branches` lists the numbers of the continuations that start with it.
    The last token of a continuation is only looked up in the logits, so only shorter prefixes are nodes.
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
        """Log probability of each token that follows one of the nodes, from the logits after that node."""
        steps = {}
        # Row by row, because all rows at once in float64 would use more memory than a small base.
        for node, row in zip(nodes, rows, strict=True):
            total = log_total(row)
            steps.update({(*node, token): float(row[token]) - total for token in self._following.get(node, ())})
        return steps

    def totals(self, steps: dict[Continuation, float]) -> dict[Continuation, float]:
        """Log probability of each continuation: the sum over its steps."""
        return {tokens: math.fsum(steps[tokens[: end + 1]] for end in range(len(tokens))) for tokens in self._group}
