"""A prompt's length in, the batches that compute it out: cut where the prompt alone decides.

An engine's sums come out a little different in batches of other sizes. Equal tokens in equal batches give equal bits,
so a state stands in for a computation exactly where its batches ended at the places of the prompt that takes it up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

CHUNK = 128
"""Tokens of a prompt that are computed in one go; between chunks a call can be stopped."""


def places_of(end: int, cuts: Iterable[int], rows: int = CHUNK) -> list[int]:
    """Where a prompt of `end` tokens is cut: at the cuts, and at every so many tokens from the first of all."""
    return sorted({*(cut for cut in cuts if 0 < cut <= end), *range(rows, end + 1, rows)})


def batches(begin: int, end: int, places: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The batches from one token to another, as their begins and ends."""
    ends = [*(place for place in places if begin < place < end), end]
    yield from zip([begin, *ends], ends, strict=False)


def common_place(ends: Sequence[int], places: Sequence[int], most: int) -> int:
    """Up to which of its tokens, at most so many, a sequence whose batches had these ends was cut at these places."""
    common = 0
    for one, other in zip(ends, places, strict=False):
        if one != other or one > most:
            break
        common = one
    return common
