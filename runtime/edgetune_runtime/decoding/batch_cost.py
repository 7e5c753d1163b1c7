"""The cost of a step of several tokens, in single-token steps, and how long a draft is worth verifying."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence


class BatchCost:
    """The cost of decoding several tokens in one step, interpolated between the sizes of `measured` {tokens: cost}.

    `logits` {tokens: cost} is the cost of the logits of several tokens, in those of one, and `excess` the share of a
    single-token step that they take beyond their share in the base on which `measured` was measured. A step has at
    least `least` tokens.
    """

    def __init__(
        self,
        measured: Mapping[int, float],
        logits: Mapping[int, float] | None = None,
        excess: float = 0.0,
        least: int = 1,
    ) -> None:
        self._least = least
        self._steps, self._logits, self._excess = _Line(measured), _Line(logits or {}), excess

    def of(self, tokens: int, drafted: int = 0) -> float:
        """The cost of a step of `tokens` tokens, the last `drafted` of which need logits of their own."""
        return self._steps.at(max(tokens, self._least)) + self._excess * (self._logits.at(drafted + 1) - 1)

    def worthwhile(self, chances: Sequence[float], certain: int = 1) -> int:
        """How many drafted tokens to verify after `certain` ones for the lowest expected cost per token.

        `chances[i]` is the probability that the first i + 1 drafted tokens are right.
        """
        tokens, best, count = float(certain), certain / self.of(certain), 0
        for number, chance in enumerate(chances, 1):
            tokens += chance
            rate = tokens / self.of(certain + number, number)
            if rate > best:
                best, count = rate, number
        return count


class _Line:
    """A line from (1, 1) through the given points and on; constant where there are none."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self._sizes, self._costs = [1, *points], [1.0, *points.values()]

    def at(self, size: int) -> float:
        if len(self._sizes) == 1:
            return 1.0
        place = min(max(1, bisect_left(self._sizes, size)), len(self._sizes) - 1)
        low, high = self._sizes[place - 1], self._sizes[place]
        share = (size - low) / (high - low)
        return self._costs[place - 1] + share * (self._costs[place] - self._costs[place - 1])
