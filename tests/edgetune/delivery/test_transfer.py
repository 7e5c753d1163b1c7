from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from edgetune_runtime.errors import BusyError, UsageError, VerificationError

from edgetune.delivery.board import transfer
from edgetune.delivery.board.durable import locked
from edgetune.delivery.board.errors import UnreachableError

DATA = bytes(range(256)) * 3000
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
EMPTY = hashlib.sha256(b"").hexdigest()


@contextmanager
def piped(data: bytes) -> Iterator[IO[bytes]]:
    """A pipe with `data`, and then its end."""
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb", buffering=0) as source:
        yield source
    thread.join()


def receive(store: Path, data: bytes, offset: int = 0, digest: str = DIGEST, size: int = len(DATA)) -> None:
    with piped(data) as source:
        transfer.receive(store, transfer.Part(digest, offset, size), source)


def test_a_file_that_was_cut_off_is_continued(tmp_path: Path) -> None:
    assert transfer.have(tmp_path, {DIGEST: len(DATA)}) == {}
    with pytest.raises(UnreachableError, match=f"300000 of {len(DATA)} bytes"):
        receive(tmp_path, DATA[:300_000])
    assert transfer.have(tmp_path, {DIGEST: len(DATA)}) == {DIGEST: 300_000}
    receive(tmp_path, DATA[300_000:], 300_000)
    assert transfer.have(tmp_path, {DIGEST: len(DATA)}) == {DIGEST: len(DATA)}
    assert [path.name for path in tmp_path.iterdir()] == [DIGEST]
    assert (tmp_path / DIGEST).read_bytes() == DATA


def test_an_empty_file_is_received_too(tmp_path: Path) -> None:
    receive(tmp_path, b"", 0, EMPTY, 0)
    assert transfer.have(tmp_path, {EMPTY: 0}) == {EMPTY: 0}


def test_bytes_with_another_digest_are_refused_and_deleted(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=f"{DIGEST[:12]} are damaged"):
        receive(tmp_path, DATA[:-1] + b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_damaged_on_the_board_is_sent_again(tmp_path: Path) -> None:
    receive(tmp_path, DATA)
    (tmp_path / DIGEST).write_bytes(DATA[:-1] + b"x")
    assert transfer.have(tmp_path, {DIGEST: len(DATA)}) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("data", "found"), [(DATA, {DIGEST: len(DATA)}), (b"x" * len(DATA), {})])
def test_a_board_that_stopped_before_the_rename_checks_the_part(
    tmp_path: Path, data: bytes, found: dict[str, int]
) -> None:
    (tmp_path / f"{DIGEST}.part").write_bytes(data)
    assert transfer.have(tmp_path, {DIGEST: len(DATA)}) == found
    assert not (tmp_path / f"{DIGEST}.part").exists()


def test_parts_of_other_deploys_are_deleted(tmp_path: Path) -> None:
    (tmp_path / f"{EMPTY}.part").write_bytes(b"x")
    (tmp_path / f"{DIGEST}.part").write_bytes(b"x")
    assert transfer.have(tmp_path, {DIGEST: len(DATA)}) == {DIGEST: 1}
    assert [path.name for path in tmp_path.iterdir()] == [f"{DIGEST}.part"]


def test_an_offset_that_is_not_the_end_of_the_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{DIGEST}.part").write_bytes(DATA[:10])
    with pytest.raises(UsageError, match="has 10 bytes, not 5"):
        receive(tmp_path, b"", 5)


def test_several_files_come_in_one_stream(tmp_path: Path) -> None:
    parts = transfer.parse_parts([DIGEST, "0", str(len(DATA)), EMPTY, "0", "0", OTHER, "0", "5"])
    with piped(DATA + b"other") as source:
        for part in parts:
            transfer.receive(tmp_path, part, source)
    assert {path.name for path in tmp_path.iterdir()} == {DIGEST, EMPTY, OTHER}
    assert (tmp_path / OTHER).read_bytes() == b"other"


@pytest.mark.parametrize("words", [["../../etc/passwd", "0", "1"], ["A" * 64, "0", "1"], [DIGEST], [DIGEST, "x", "1"]])
def test_a_list_of_files_that_is_none_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"not a sha256|list of files is wrong"):
        transfer.parse_parts(words)


def test_one_deploy_at_a_time(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    out = io.StringIO()
    with os.fdopen(reader, "rb", buffering=0) as source, os.fdopen(writer, "wb") as host:
        first = threading.Thread(target=transfer.hold, args=(tmp_path, source, out))
        first.start()
        while not out.getvalue():
            pass
        with piped(b"") as other, pytest.raises(BusyError, match=rf"another deploy is writing to {tmp_path}; wait"):
            transfer.hold(tmp_path, other, out)
        host.close()
        first.join()
    with piped(b"") as other:
        transfer.hold(tmp_path, other, out)
    assert out.getvalue() == "held\nheld\n"


def test_no_deploy_begins_while_an_install_is_at_work(tmp_path: Path) -> None:
    with locked(tmp_path), piped(b"") as host, pytest.raises(BusyError, match="another install is using"):
        transfer.hold(tmp_path, host, io.StringIO())


def test_a_host_that_went_silent_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALLED_S", 0.05)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as source, os.fdopen(writer, "wb"):
        transfer.hold(tmp_path, source, io.StringIO())
        with pytest.raises(UnreachableError, match="0 of 1 bytes"):
            transfer.receive(tmp_path, transfer.Part(DIGEST, 0, 1), source)
