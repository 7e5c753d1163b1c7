"""Scores of continuations that are computed one after the other, for engines whose sequence has no branches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgetune_runtime.engines.base import Logits, log_total
from edgetune_runtime.states.cache import common_prefix


def scores_in_order(
    continuations: Sequence[Sequence[int]], last: Logits, logits_after: Callable[[int, Sequence[int]], Logits]
) -> list[float]:
    """The sum of log probabilities (nats) of each continuation of a sequence whose last logits are given.

    `logits_after(kept, tokens)` keeps so many tokens after the sequence, appends more, and returns the logits after
    each of them. The continuations are taken in sorted order, so that common prefixes are computed once.
    """
    scores: dict[tuple[int, ...], float] = {}
    # rows[i] has the logits after the first i tokens of `path`, and their log-sum-exp.
    path: tuple[int, ...] = ()
    rows = [(last, log_total(last))]
    for tokens in sorted({tuple(tokens) for tokens in continuations}):
        kept = max(0, min(common_prefix(path, tokens), len(tokens) - 1))
        path = tokens[:-1]
        del rows[kept + 1 :]
        if path[kept:]:
            rows += [(row, log_total(row)) for row in logits_after(kept, path[kept:])]
        scores[tokens] = math.fsum(float(rows[i][0][token]) - rows[i][1] for i, token in enumerate(tokens))
    return [scores[tuple(tokens)] for tokens in continuations]
