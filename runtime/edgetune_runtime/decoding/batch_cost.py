"""Number of tokens of a step in, its cost in single-token steps out; how long a draft is worth verifying."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence


class BatchCost:
    """The cost of decoding several tokens in one step, interpolated between the sizes of `measured` {tokens: cost}."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self._sizes, self._costs = [1, *measured], [1.0, *measured.values()]

    def of(self, tokens: int) -> float:
        """The cost of a step of `tokens` tokens."""
        place = min(max(1, bisect_left(self._sizes, tokens)), len(self._sizes) - 1)
        low, high = self._sizes[place - 1], self._sizes[place]
        share = (tokens - low) / (high - low)
        return self._costs[place - 1] + share * (self._costs[place] - self._costs[place - 1])

    def worthwhile(self, chances: Sequence[float], certain: int = 1) -> int:
        """How many drafted tokens to verify after `certain` ones for the lowest expected cost per token.

        `chances[i]` is the probability that the first i + 1 drafted tokens are right.
        """
        tokens, best, count = float(certain), certain / self.of(certain), 0
        for number, chance in enumerate(chances, 1):
            tokens += chance
            rate = tokens / self.of(certain + number)
            if rate > best:
                best, count = rate, number
        return count
