"""A text is assembled from the pieces of an older one and those that the repository has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgetune_runtime.errors import UnreachableError
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.pieces import FOLDER, assembled, cut, known_pieces, parse_pieces

RNG = random.Random(1)
LINES = [b'  "sha256": "%032x",\n' % RNG.getrandbits(128) for _ in range(4000)]
OLD = b"".join(LINES)


def changed(lines: dict[int, bytes]) -> bytes:
    return b"".join(lines.get(number, line) for number, line in enumerate(LINES))


class Counted(Location):
    """A folder with a text and its pieces, and the bytes that are read of them."""

    def __init__(self, folder: Path, text: bytes) -> None:
        super().__init__(str(folder))
        (folder / "new").write_bytes(text)
        (folder / FOLDER).mkdir(exist_ok=True)
        for piece, part in cut(text):
            (folder / FOLDER / piece.digest).write_bytes(part)
        self.pieces = parse_pieces([str(piece) for piece, _ in cut(text)], len(text))
        self.read_bytes = 0

    def blocks(self, path: str, most: int, offset: int = 0) -> Iterator[bytes]:
        for block in super().blocks(path, most, offset):
            self.read_bytes += len(block)
            yield block

    def assembled(self, offset: int = 0) -> bytes:
        known = known_pieces([b"another text\n", OLD])
        return b"".join(assembled(self, "new", self.pieces, known, offset))


@pytest.mark.parametrize(
    ("new", "most"),
    [
        (changed({}), 0),
        (changed({0: b"first\n", 2000: b"", 3999: b"last\n"}), 12_000),
        (changed({1000: b"more\n" * 2000}), 20_000),
        (OLD[:50_000], 6000),
        (OLD[1:], 6000),
        (b"x" * 30_000, 30_000),
        (b"the same line\n" * 3000, 3000 * 14),
    ],
    ids=["same", "lines", "longer", "shorter", "moved", "one line", "same lines"],
)
def test_what_has_changed_is_read_and_the_rest_copied(new: bytes, most: int, tmp_path: Path) -> None:
    location = Counted(tmp_path, new)
    assert location.assembled() == new
    assert location.read_bytes <= most
    # A download that was cut off goes on anywhere.
    for offset in (1, len(new) // 2, len(new) - 1):
        assert location.assembled(offset) == new[offset:]


def test_the_file_is_read_where_the_repository_lacks_a_piece_and_no_piece_that_is_too_short(tmp_path: Path) -> None:
    new = changed({100: b"x\n", 2000: b"y\n"})
    location = Counted(tmp_path, new)
    first, second = (piece for piece, _ in cut(new) if piece.digest not in known_pieces([OLD]))
    (tmp_path / FOLDER / second.digest).unlink()
    assert location.assembled() == new
    (tmp_path / FOLDER / first.digest).write_bytes(b"short")
    with pytest.raises(UnreachableError, match=f"5 of {first.bytes} bytes"):
        location.assembled()


@pytest.mark.parametrize(
    "listed",
    [["0" * 20 + " 5000"], ["0" * 20 + " 1"] * 10_000, ["0" * 20 + " -1"], ["0" * 20 + " 1e3"], ["x 1"], [""], "ab"],
)
def test_a_list_that_is_not_one_of_the_file_is_refused(listed: list[str]) -> None:
    with pytest.raises(ValueError, match="pieces"):
        parse_pieces(listed, 10_000)
    assert parse_pieces([], 10_000) == ()
