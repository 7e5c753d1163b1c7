"""Pieces of a text file, by their digests: those that an older version of the file has too are not downloaded again.

A repository lists the pieces of its large texts in what it signs, and has each piece as a file too. A device cuts its
older texts in the same way, copies the pieces that are equal, and reads the others; the whole file is then verified as
any other one.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgetune_runtime.errors import UnreachableError

from .fetch import Location, MissingError

FOLDER = "pieces"
"""Folder of a repository with the pieces by their digests."""
_LEAST_FILE_BYTES = 8192
"""A smaller file is read as a whole."""
_LEAST_BYTES, _MOST_BYTES = 1024, 8192
"""Limits of a piece; the last one of a file may be shorter, and one whose last line is long may be longer."""
_LINES = 32
"""One of so many lines ends a piece: more pieces make their list longer, fewer ones what a change costs."""
_DIGITS = 20
_PIECE = re.compile(rf"([0-9a-f]{{{_DIGITS}}}) ([1-9]\d{{0,7}})", re.ASCII)

KnownPieces = Mapping[str, bytes]
"""The pieces that a device has, by their digests."""


@dataclass(frozen=True)
class Piece:
    """The beginning of a piece's sha256, which names it in a repository, and its size."""

    digest: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.digest} {self.bytes}"


def cut(data: bytes) -> list[tuple[Piece, bytes]]:
    """The pieces of a text; none if it is small.

    Lines end them by what is in them, so that a change moves the ends near it only.
    """
    parts, begin, end = list[bytes](), 0, 0
    for line in data.splitlines(keepends=True) if len(data) >= _LEAST_FILE_BYTES else ():
        end += len(line)
        is_end = zlib.crc32(line) % _LINES == 0 or end - begin >= _MOST_BYTES
        if is_end and end - begin >= _LEAST_BYTES:
            parts.append(data[begin:end])
            begin = end
    if begin < end:
        parts.append(data[begin:end])
    return [(Piece(hashlib.sha256(part).hexdigest()[:_DIGITS], len(part)), part) for part in parts]


def parse_pieces(raw: Sequence[str], size: int) -> tuple[Piece, ...]:
    """The pieces in the list of a file with so many bytes; ValueError for a list that is not one of this file."""
    if len(raw) > size // _LEAST_BYTES + 1:
        raise ValueError(f"it has {len(raw)} pieces of {size} bytes")
    matches = [_PIECE.fullmatch(text) for text in raw]
    pieces = tuple(Piece(match[1], int(match[2])) for match in matches if match is not None)
    if len(pieces) != len(raw) or (raw and sum(piece.bytes for piece in pieces) != size):
        raise ValueError("its pieces are not those of the file")
    return pieces


def known_pieces(texts: Iterable[bytes]) -> KnownPieces:
    """The pieces of older texts."""
    return {piece.digest: part for text in texts for piece, part in cut(text)}


def assembled(
    location: Location, path: str, pieces: Sequence[Piece], known: KnownPieces, offset: int = 0
) -> Iterator[bytes]:
    """The bytes of a file from an offset on: known pieces, and the others from the repository; errors as of `blocks`.

    The file itself is read if most of it is not known, or where the repository has no piece.
    """
    size, place = sum(piece.bytes for piece in pieces), 0
    is_known = [len(known.get(piece.digest, b"")) == piece.bytes for piece in pieces]
    if 2 * sum(piece.bytes for piece, is_there in zip(pieces, is_known, strict=True) if is_there) < size:
        yield from location.blocks(path, size - offset, offset)
        return
    for piece, is_there in zip(pieces, is_known, strict=True):
        begin, place = max(place, offset), place + piece.bytes
        if place <= offset:
            continue
        try:
            data = known[piece.digest] if is_there else _read(location, piece)
        except MissingError:
            yield from location.blocks(path, size - begin, begin)
            return
        yield data[begin - place :]


def _read(location: Location, piece: Piece) -> bytes:
    data = location.read(f"{FOLDER}/{piece.digest}", piece.bytes)
    if len(data) != piece.bytes:
        message = f"{len(data)} of {piece.bytes} bytes of {location.text}/{FOLDER}/{piece.digest} arrived"
        raise UnreachableError(message, "update again")
    return data
