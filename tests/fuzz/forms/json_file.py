"""Edits of JSON: other values, missing, renamed and repeated keys; alone, or as the head of a file with other bytes."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .raw import Edit, byte_edit, with_bytes

Path = list[str | int]
WORDS = ("", "\0", "\x1b[2J\x1b]0;x\x07", "../../etc/passwd", "/", "a\nb", "\ud800", "é" * 300, "-", "1e999", "(a+)+$")
NUMBERS = (0, -1, 1, 2, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, 1e308, -1e308, 1e-320)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [{}], {"a": {"a": []}})


class Json:
    """A file of JSON."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """One to three edits of values, or in one of ten cases of bytes."""
        if rng.random() < 0.1:
            return [byte_edit(len(data), rng)]
        return json_edits(json.loads(data), rng)

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits."""
        return with_bytes(with_values(json.loads(data), edits).encode("utf-8", "surrogatepass"), edits)


class Checked:
    """A file of `checked_file`: a line of JSON, whose length and checksum are made to fit, then bytes."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """Edits of the facts, of the other values of the line, or of the bytes after it."""
        line, rest = data.split(b"\n", 1)
        where = rng.random()
        if where < 0.3:
            return [["data", *byte_edit(len(rest), rng)[1:]] for _ in range(rng.choice((1, 2)))]
        if where < 0.4:
            return [byte_edit(len(data), rng)]
        head = json.loads(line)
        if where < 0.5:
            return json_edits(head, rng)
        return [[kind, ["about", *path], *rest] for kind, path, *rest in json_edits(head["about"], rng)]

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits; length and checksum are those of its bytes unless an edit changes them."""
        line, rest = data.split(b"\n", 1)
        rest = with_bytes(rest, [["bytes", *edit[1:]] for edit in edits if edit[0] == "data"])
        head = json.loads(line) | {"bytes": len(rest), "crc32": zlib.crc32(rest)}
        return with_bytes(_ascii(with_values(head, edits)) + b"\n" + rest, edits)


class Safetensors:
    """A file of safetensors: the length of the JSON that follows, then bytes."""

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """Edits of the JSON, or in one of four cases of bytes."""
        if rng.random() < 0.25:
            return [byte_edit(len(data), rng)]
        return json_edits(self._parts(data)[0], rng)

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The file with the edits."""
        head, rest = self._parts(data)
        text = _ascii(with_values(head, edits))
        return with_bytes(len(text).to_bytes(8, "little") + text + rest, edits)

    @staticmethod
    def _parts(data: bytes) -> tuple[Any, bytes]:
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]


def json_edits(value: object, rng: random.Random) -> list[Edit]:
    """One to three random edits of a JSON value."""
    paths = [*_paths(value, [])]
    return [_edit(value, paths, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]


def with_values(value: Any, edits: Sequence[Edit]) -> str:  # noqa: ANN401 - any JSON
    """The text of a JSON value after its edits; edits of other kinds are ignored."""
    box = [json.loads(json.dumps(value))]
    repeated: list[tuple[str, str]] = []
    for kind, *rest in edits:
        if kind in _CHANGES:
            path, *arguments = rest
            _CHANGES[kind](box, [0, *path], *arguments)
        elif kind == "twice":
            repeated.append((json.dumps(rest[0]), json.dumps(rest[1])))
    text = _dumped(box[0])
    for key, other in repeated:
        text = text.replace(f"{key}: ", f"{key}: {other}, {key}: ", 1)
    return text


def hostile(rng: random.Random) -> Any:  # noqa: ANN401 - any JSON
    """A value that a reader may not expect."""
    return rng.choice(rng.choice((WORDS, NUMBERS, NUMBERS, NOT_FINITE, OTHERS)))


def _edit(value: object, paths: Sequence[Path], rng: random.Random) -> Edit:
    path = rng.choice(paths)
    kind = rng.choice(("set", "set", "set", "set", "copy", "drop", "rename", "twice", "nest", "long", "near"))
    if kind == "copy":
        return ["set", path, _at(value, rng.choice(paths))]
    if kind == "near":
        number = _at(value, path)
        if isinstance(number, int | float):
            return [
                "set",
                path,
                rng.choice((-number, number + 1, number - 1, number * 1000, float(number), str(number))),
            ]
    if kind in ("nest", "long"):
        return [kind, path, rng.choice((100, 900, 20_000) if kind == "nest" else (1000, 200_000))]
    keys = [path for path in paths if path and isinstance(path[-1], str)]
    if kind in ("rename", "twice") and keys:
        path = rng.choice(keys)
        return ["rename", path, rng.choice(WORDS)] if kind == "rename" else ["twice", path[-1], hostile(rng)]
    return ["drop", path] if kind == "drop" else ["set", path, hostile(rng)]


def _paths(value: object, path: Path) -> Iterator[Path]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(items):
        # Of long lists and tables, such as a vocabulary, a few items are enough.
        if number < 40 or number % 50 == 0:
            yield from _paths(item, [*path, key])


def _at(value: Any, path: Path) -> Any:  # noqa: ANN401 - any JSON
    for key in path:
        value = value[key]
    return value


def _parent(box: Any, path: Path) -> Any:  # noqa: ANN401 - any JSON
    """The object or list in which the last key of a path is, or may be put; None if there is none."""
    try:
        parent = _at(box, path[:-1])
    except (KeyError, IndexError, TypeError):
        return None
    is_place = isinstance(parent, list) and path[-1] in range(len(parent))
    return parent if is_place or isinstance(parent, dict) else None


def _set(box: Any, path: Path, value: object) -> None:  # noqa: ANN401 - any JSON
    parent = _parent(box, path)
    if parent is not None:
        parent[path[-1]] = value


def _drop(box: Any, path: Path) -> None:  # noqa: ANN401 - any JSON
    parent = _parent(box, path)
    if parent is not None and parent is not box and (isinstance(parent, list) or path[-1] in parent):
        del parent[path[-1]]


def _rename(box: Any, path: Path, name: str) -> None:  # noqa: ANN401 - any JSON
    parent = _parent(box, path)
    if isinstance(parent, dict) and path[-1] in parent:
        parent[name] = parent.pop(path[-1])


def _nest(box: Any, path: Path, depth: int) -> None:  # noqa: ANN401 - any JSON
    _set(box, path, f"nested {depth} deep")


def _long(box: Any, path: Path, length: int) -> None:  # noqa: ANN401 - any JSON
    _set(box, path, "a" * length)


_CHANGES: Mapping[str, Callable[..., None]] = {
    "set": _set,
    "drop": _drop,
    "rename": _rename,
    "nest": _nest,
    "long": _long,
}


def _dumped(value: object) -> str:
    """JSON with its nested lists, which are too deep for `json.dumps`, in their places."""
    text = json.dumps(value, ensure_ascii=False)
    for depth in (100, 900, 20_000):
        text = text.replace(f'"nested {depth} deep"', "[" * depth + "]" * depth)
    return text


def _ascii(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
