from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from edgetune_runtime.errors import UnreachableError, VerificationError
from edgetune_runtime.store.files import Store

from edgetune.delivery.board import transfer

DATA = bytes(range(256)) * 3000
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
EMPTY = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    made.folder.mkdir()
    return made


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


def receive(store: Store, data: bytes, digest: str = DIGEST, size: int = len(DATA)) -> None:
    with piped(data) as source:
        transfer.receive(store, digest, size, source)


def test_a_file_that_was_cut_off_is_continued(store: Store) -> None:
    assert store.received({DIGEST: len(DATA)}) == {}
    with pytest.raises(UnreachableError, match=f"300000 of {len(DATA)} bytes"):
        receive(store, DATA[:300_000])
    assert store.received({DIGEST: len(DATA)}) == {DIGEST: 300_000}
    receive(store, DATA[300_000:])
    assert store.received({DIGEST: len(DATA)}) == {DIGEST: len(DATA)}
    assert [path.name for path in store.folder.iterdir()] == [DIGEST]
    assert (store.folder / DIGEST).read_bytes() == DATA


def test_an_empty_file_is_received_too(store: Store) -> None:
    receive(store, b"", EMPTY, 0)
    assert store.received({EMPTY: 0}) == {EMPTY: 0}


def test_bytes_with_another_digest_are_refused_and_deleted(store: Store) -> None:
    with pytest.raises(VerificationError, match=f"{DIGEST[:12]} are damaged"):
        receive(store, DATA[:-1] + b"x")
    assert list(store.folder.iterdir()) == []


def test_no_more_is_written_than_a_file_has(store: Store) -> None:
    asked = 0

    def endless(_start: int) -> Iterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield DATA

    with pytest.raises(VerificationError, match=f"{DIGEST[:12]} are damaged"):
        store.fill(DIGEST, len(DATA), endless, "copy it again")
    assert asked == 2
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize(("step_bytes", "connections"), [(100_000, 8), (1 << 16, 12), (1000, 3)])
def test_a_download_goes_on_as_long_as_connections_bring_much(store: Store, step_bytes: int, connections: int) -> None:
    starts: list[int] = []

    def some_from(start: int) -> Iterator[bytes]:
        starts.append(start)
        yield DATA[start : start + step_bytes]
        raise UnreachableError("cut off", "")

    if connections == 3:
        with pytest.raises(UnreachableError, match="cut off"):
            store.receive(DIGEST, len(DATA), some_from, "update again")
        assert store.received({DIGEST: len(DATA)}) == {DIGEST: 3000}
    else:
        store.receive(DIGEST, len(DATA), some_from, "update again")
        assert store.path(DIGEST).read_bytes() == DATA
    assert starts == [number * step_bytes for number in range(connections)]


def test_a_file_damaged_on_the_board_is_sent_again(store: Store) -> None:
    receive(store, DATA)
    (store.folder / DIGEST).write_bytes(DATA[:-1] + b"x")
    assert store.received({DIGEST: len(DATA)}) == {}
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize(("data", "found"), [(DATA, {DIGEST: len(DATA)}), (b"x" * len(DATA), {})])
def test_a_board_that_stopped_before_the_rename_checks_the_part(
    store: Store, data: bytes, found: dict[str, int]
) -> None:
    (store.folder / f"{DIGEST}.part").write_bytes(data)
    assert store.received({DIGEST: len(DATA)}) == found
    assert not (store.folder / f"{DIGEST}.part").exists()


def test_parts_of_other_deploys_are_deleted(store: Store) -> None:
    (store.folder / f"{EMPTY}.part").write_bytes(b"x")
    (store.folder / f"{DIGEST}.part").write_bytes(b"x")
    assert store.received({DIGEST: len(DATA)}) == {DIGEST: 1}
    assert [path.name for path in store.folder.iterdir()] == [f"{DIGEST}.part"]


def test_several_files_come_in_one_stream(store: Store) -> None:
    with piped(DATA + b"other") as source:
        for digest, size in ((DIGEST, len(DATA)), (EMPTY, 0), (OTHER, 5)):
            transfer.receive(store, digest, size, source)
    assert {path.name for path in store.folder.iterdir()} == {DIGEST, EMPTY, OTHER}
    assert (store.folder / OTHER).read_bytes() == b"other"


def test_a_host_that_went_silent_is_taken_for_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALLED_S", 0.05)
    reader, writer = os.pipe()
    with (
        os.fdopen(reader, "rb", buffering=0) as source,
        os.fdopen(writer, "wb"),
        pytest.raises(UnreachableError, match="0 of 1 bytes"),
    ):
        transfer.receive(store, DIGEST, 1, source)
