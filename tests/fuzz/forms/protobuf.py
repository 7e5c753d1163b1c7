"""Edits of protobuf messages, without a schema: other numbers and bytes, missing and repeated fields."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .raw import Edit, byte_edit, with_bytes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_DEPTH = 8
_NUMBERS = (0, 1, 2, 3, 6, 7, 10, 16, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = ("", "\0", "ai.onnx", "com.microsoft", "ai.onnx.ml", "location", "../../etc/passwd", "If", "Loop", "Scan")
_OPERATORS = ("ConstantOfShape", "Expand", "Tile", "Pad", "Range", "Resize", "Einsum", "NonZero", "Unique", "TopK")
Path = list[int]
"""Indexes: of a field in the file's message, of a field in that field, and so on."""


@dataclass
class Field:
    """One field of a message: a number, bytes, or a message of its own."""

    number: int
    wire: int
    value: Any
    fields: list[Field] = field(default_factory=list)


class Protobuf:
    """A file with one protobuf message."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """One to three edits of fields, or in one of seven cases of bytes."""
        if rng.random() < 0.15:
            return [byte_edit(len(data), rng)]
        known = [*_walk(parsed(data) or [], [])]
        return [_edit(known, rng) for _ in range(rng.choice((1, 1, 2, 3)))]

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits; what contains a changed field gets its new length."""
        root = Field(0, _BYTES, b"", parsed(data) or [])
        for kind, *rest in edits:
            if kind in ("number", "text", "drop", "repeat", "swap"):
                _change(root, kind, *rest)
        return with_bytes(_written(root.fields), edits)


def _edit(known: Sequence[tuple[Path, Field]], rng: random.Random) -> Edit:
    path, chosen = rng.choice(known)
    if chosen.wire == _VARINT and rng.random() < 0.8:
        near = (chosen.value + 1, max(chosen.value - 1, 0), chosen.value * 1024)
        return ["number", path, rng.choice(_NUMBERS + near)]
    if chosen.wire == _BYTES and not chosen.fields and rng.random() < 0.6:
        other = rng.choice([item for _, item in known if item.wire == _BYTES and not item.fields])
        texts = [*_TEXTS, *_OPERATORS, other.value[:200].decode("latin-1"), chosen.value[:200].decode("latin-1") + "x"]
        return ["text", path, rng.choice(texts)]
    kind = rng.choice(("drop", "repeat", "swap"))
    return [kind, path, *([rng.choice((2, 3, 1000))] if kind == "repeat" else [])]


def _walk(fields: Sequence[Field], path: Path) -> Iterator[tuple[Path, Field]]:
    for place, item in enumerate(fields):
        yield [*path, place], item
        yield from _walk(item.fields, [*path, place])


def _change(root: Field, kind: str, path: Path, value: Any = None) -> None:  # noqa: ANN401 - a number or a text
    parent = root
    for place in path[:-1]:
        if place >= len(parent.fields):
            return
        parent = parent.fields[place]
    if path[-1] >= len(parent.fields):
        return
    item = parent.fields[path[-1]]
    if kind == "drop":
        del parent.fields[path[-1]]
    elif kind == "repeat":
        parent.fields[path[-1] : path[-1]] = [item] * (value - 1)
    elif kind == "swap":
        parent.fields.append(parent.fields.pop(path[-1]))
    else:
        item.fields = []
        item.wire, item.value = (_VARINT, value) if kind == "number" else (_BYTES, value.encode("latin-1", "replace"))


def parsed(data: bytes, depth: int = 0) -> list[Field] | None:
    """The fields of a message; None for bytes that are not one, or no longer look like one."""
    fields: list[Field] = []
    place = 0
    try:
        while place < len(data):
            key, place = _varint(data, place)
            number, wire = key >> 3, key & 7
            if number == 0 or number > 2000:
                return None
            if wire == _VARINT:
                value, place = _varint(data, place)
                fields.append(Field(number, wire, value))
                continue
            if wire == _BYTES:
                size, place = _varint(data, place)
            else:
                size = _SIZES.get(wire, len(data))
            if place + size > len(data):
                return None
            content, place = data[place : place + size], place + size
            may_be_message = wire == _BYTES and size and depth < _MAX_DEPTH and not _is_text(content)
            inner = parsed(content, depth + 1) if may_be_message else None
            fields.append(Field(number, wire, content, inner or []))
    except IndexError:
        return None
    return fields


def _is_text(data: bytes) -> bool:
    return data.isascii() and data.decode("ascii").isprintable()


def _written(fields: Sequence[Field]) -> bytes:
    out = []
    for item in fields:
        out.append(_as_varint(item.number << 3 | item.wire))
        if item.wire == _VARINT:
            out.append(_as_varint(item.value))
            continue
        value = _written(item.fields) if item.fields else item.value
        if item.wire == _BYTES:
            out.append(_as_varint(len(value)))
        out.append(value)
    return b"".join(out)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise IndexError


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
