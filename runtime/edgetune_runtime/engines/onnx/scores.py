"""Scores of continuations that are computed one after the other, for engines whose sequence has no branches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgetune_runtime.engines.base import Logits, log_total
from edgetune_runtime.states.cache import common_prefix


def scores_in_order(
    continuations: Sequence[Sequence[int]],
    last: Logits,
    keep: Callable[[int], int],
    logits_of: Callable[[Sequence[int]], Logits],
) -> list[float]:
    """The sum of log probabilities (nats) of each continuation of a sequence whose last logits are given.

    `keep(count)` drops all but so many tokens after the sequence, or more of them, and returns how many are left;
    `logits_of(tokens)` appends tokens and returns the logits after each of them. The continuations are taken in sorted
    order, so that common prefixes are computed once.
    """
    scores: dict[tuple[int, ...], float] = {}
    # rows[i] has the logits after the first i tokens of `path`, and their log-sum-exp.
    path: tuple[int, ...] = ()
    rows = [(last, log_total(last))]
    for tokens in sorted({tuple(tokens) for tokens in continuations}):
        kept = max(0, min(common_prefix(path, tokens), len(tokens) - 1))
        path = tokens[:-1]
        if path[kept:]:
            kept = keep(kept)
        del rows[kept + 1 :]
        if path[kept:]:
            rows += [(row, log_total(row)) for row in logits_of(path[kept:])]
        scores[tokens] = math.fsum(float(rows[i][0][token]) - rows[i][1] for i, token in enumerate(tokens))
    return [scores[tuple(tokens)] for tokens in continuations]
