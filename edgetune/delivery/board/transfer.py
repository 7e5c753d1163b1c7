"""Receives files on the board, named by their digest, and continues those that were cut off. Standard library only.

A file is `DIGEST` in the store when it is whole, and `DIGEST.part` until then.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgetune_runtime.atomic import flush_to_disk, raising_out_of_space
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import BusyError, UsageError, VerificationError

from . import check, venv
from .durable import locked
from .errors import UnreachableError
from .kit import Kit
from .store import Store

STALLED_S = 60.0
"""Seconds without a byte from the host after which the connection is taken for dead."""
LOCK_NAME = "deploy.lock"
"""Held by a deploy from its first file to its end, while it runs other commands that need the lock of the prefix."""
HELD = "held"
_PART = ".part"
_CHUNK_BYTES = 1 << 18
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """A file that the host sends from `offset` on; `size` is that of the whole file, in bytes."""

    digest: str
    offset: int
    size: int


def missing(prefix: Path, kit: Kit) -> dict[str, int]:
    """Digest of each file that an install of the kit needs and the store lacks, and how many bytes it has of it.

    IncompatibleError if the kit does not fit on this board.
    """
    has_packages = venv.is_complete(prefix, kit.wheels)
    needed = (*kit.version_files, *(() if has_packages else kit.wheel_files))
    sizes = {file.sha256: file.bytes for file in needed}
    found = have(Store(prefix).folder, sizes)
    lacking = {digest: found.get(digest, 0) for digest, size in sizes.items() if found.get(digest) != size}
    bytes_to_write = sum(sizes[digest] - offset for digest, offset in lacking.items())
    packages_mb = 0 if has_packages else kit.needs["packages_mb"]
    check.require_fit(kit, prefix, disk_mb=packages_mb + bytes_to_write // 10**6)
    return lacking


def have(store: Path, wanted: Mapping[str, int]) -> dict[str, int]:
    """How many bytes the store has of each file that it has any of; `wanted` maps digests to sizes.

    A file that is whole has the right digest. Deletes damaged files, and the parts of other files: nobody will continue
    these.
    """
    for path in store.glob(f"*{_PART}"):
        if path.stem not in wanted:
            path.unlink()
    found = {digest: _bytes_of(store, digest, size) for digest, size in wanted.items()}
    return {digest: count for digest, count in found.items() if count is not None}


def parse_parts(words: Sequence[str]) -> list[Part]:
    """The files that the host sends, three words each; UsageError for anything else."""
    try:
        triples = zip(words[::3], words[1::3], words[2::3], strict=True)
        parts = [Part(digest, int(offset), int(size)) for digest, offset, size in triples]
    except ValueError as error:
        raise UsageError(f"the list of files is wrong: {error}", "run the deploy again") from error
    wrong = next((part for part in parts if not _DIGEST.fullmatch(part.digest)), None)
    if wrong is not None:
        raise UsageError(f"{wrong.digest[:80]!r} is not a sha256 in lower-case hex", "run the deploy again")
    return parts


def receive(store: Path, wanted: Part, source: IO[bytes]) -> None:
    """Append the rest of a file from `source` to its part; then check the digest and give it its name.

    Reads no byte more than that. Raises UnreachableError if the bytes end or stop before, and keeps the part;
    VerificationError if the digest is wrong, and deletes it; BusyError if another process writes to it; UsageError if
    the part does not end at the offset; OutOfSpaceError if the disk is full.
    """
    digest, offset, size = wanted.digest, wanted.offset, wanted.size
    store.mkdir(parents=True, exist_ok=True)
    part, whole = _part(store, digest), store / digest
    with raising_out_of_space(part), part.open("ab") as file, _locked(file, f"file {digest[:12]}"):
        if file.tell() != offset:
            message = f"the part of {digest[:12]} has {file.tell()} bytes, not {offset}"
            raise UsageError(message, "run the deploy again")
        try:
            left = size - offset
            for data in _parts(source, left):
                file.write(data)
                left -= len(data)
        finally:
            file.flush()
            os.fsync(file.fileno())
        if left:
            raise UnreachableError(f"{size - left} of {size} bytes of {digest[:12]} arrived", "run the deploy again")
        if sha256_of(part) != digest:
            part.unlink()
            raise VerificationError(f"the bytes that arrived for {digest[:12]} are damaged", "run the deploy again")
        part.chmod(0o444)
        part.rename(whole)
        flush_to_disk(store)


def hold(prefix: Path, source: IO[bytes], out: IO[str]) -> None:
    """Hold the lock of deploys until `source` ends or is silent for STALLED_S; says HELD on `out` when it has it.

    BusyError if another deploy holds it, or an install is at work, which would delete what is sent meanwhile.
    """
    prefix.mkdir(parents=True, exist_ok=True)
    with (prefix / LOCK_NAME).open("ab") as file, _locked(file, str(prefix)):
        with locked(prefix):
            pass
        print(HELD, file=out, flush=True)
        for _ in _parts(source, sys.maxsize):
            pass


def _bytes_of(store: Path, digest: str, size: int) -> int | None:
    """The bytes that the store has of a file, None if it has none of it."""
    whole, part = store / digest, _part(store, digest)
    if not whole.exists() and part.exists() and part.stat().st_size >= size:
        # The board stopped between the last byte and the new name.
        part.chmod(0o444)
        part.rename(whole)
    if whole.exists():
        if sha256_of(whole) == digest:
            return size
        whole.unlink()
    return part.stat().st_size if part.exists() else None


def _parts(source: IO[bytes], most: int) -> Iterator[bytes]:
    """The bytes of `source` as they come, at most `most`, until it ends or is silent."""
    while most > 0:
        if not select.select([source], [], [], STALLED_S)[0]:
            return
        data = os.read(source.fileno(), min(_CHUNK_BYTES, most))
        if not data:
            return
        most -= len(data)
        yield data


@contextmanager
def _locked(file: IO[bytes], what: str) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"another deploy is writing to {what}"
        raise BusyError(message, f"wait for it to end; a lost connection is noticed after {STALLED_S:.0f} s") from error
    yield


def _part(store: Path, digest: str) -> Path:
    return store / f"{digest}{_PART}"
