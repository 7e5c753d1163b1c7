"""Edits of bytes, for any form: flipped, replaced, removed, inserted and repeated bytes, and a cut end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

Edit = list[Any]
RAW = "bytes"
"""The first item of an edit of bytes, in all forms."""
_NUMBERS = ("00000000", "ffffffff", "ffffff7f", "00000080", "01000000", "ffffffffffffffff", "0000000000000080")


class Form(Protocol):
    """A form of files."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """Random edits of the file `data`."""

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits; one that does not apply to it changes nothing."""


class Bytes:
    """A file without a structure."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """One to three edits of bytes."""
        return [byte_edit(len(data), rng) for _ in range(rng.choice((1, 1, 2, 3)))]

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits."""
        return with_bytes(data, edits)


def byte_edit(size: int, rng: random.Random) -> Edit:
    """A random edit of a file of `size` bytes, near its beginning in one of three cases, where headers are."""
    place = rng.randrange(min(size, 256) if rng.random() < 0.33 else max(size, 1))
    kind = rng.choice(("put", "put", "number", "number", "cut", "insert", "repeat", "truncate"))
    if kind == "put":
        return [RAW, "put", place, bytes([rng.randrange(256)]).hex()]
    if kind == "number":
        return [RAW, "put", place, rng.choice(_NUMBERS)]
    if kind == "insert":
        return [RAW, "insert", place, rng.randbytes(rng.choice((1, 4, 8, 64))).hex()]
    if kind == "truncate":
        return [RAW, "cut", place, size]
    length = rng.choice((1, 4, 8, 64, 1024))
    return [RAW, kind, place, place + length]


def with_bytes(data: bytes, edits: Sequence[Edit]) -> bytes:
    """`data` after its edits of bytes; others are ignored."""
    for edit in edits:
        if edit[0] == RAW:
            _, kind, place, value = edit
            if kind in ("put", "insert"):
                new = bytes.fromhex(value)
                data = data[:place] + new + data[place + (len(new) if kind == "put" else 0) :]
            elif kind == "cut":
                data = data[:place] + data[value:]
            else:
                data = data[:value] + data[place:]
    return data
