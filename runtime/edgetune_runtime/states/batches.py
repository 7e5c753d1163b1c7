"""Split a prompt into batches at boundaries that depend on the prompt alone.

The last bits of an engine's results depend on the batch sizes. Equal tokens in equal batches give equal bits, so a
state replaces a computation exactly only up to the last batch boundary that it has in common with the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

CHUNK = 128
"""Tokens of a prompt per batch; a call can be stopped between batches."""


def boundaries_of(end: int, cuts: Iterable[int], rows: int) -> list[int]:
    """Where a prompt of `end` tokens is split: at the `cuts`, and at all multiples of `rows`."""
    return sorted({*(cut for cut in cuts if 0 < cut <= end), *range(rows, end + 1, rows)})


def batches(begin: int, end: int, boundaries: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The batches from token `begin` to token `end`, as (begin, end)."""
    ends = [*(place for place in boundaries if begin < place < end), end]
    yield from zip([begin, *ends], ends, strict=False)


def common_boundary(ends: Sequence[int], boundaries: Sequence[int], max_end: int) -> int:
    """The last batch end, at most `max_end`, up to which a sequence was split at the same `boundaries`."""
    common = 0
    for one, other in zip(ends, boundaries, strict=False):
        if one != other or one > max_end:
            break
        common = one
    return common
