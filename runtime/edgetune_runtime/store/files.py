"""The files of a store by their digest, which its versions share through hard links."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import NotFoundError, UnreachableError, VerificationError
from edgetune_runtime.formats.atomic import flush_to_disk, raising_out_of_space
from edgetune_runtime.type_checks import DIGEST

from .kit import COPY_AGAIN, KitFile

FOLDER = "files"
_PART = ".part"
_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 3
"""How often in a row a download may fail with less than `_PROGRESS_BYTES` of it."""
_PROGRESS_BYTES = 1 << 16


class Store:
    """`PREFIX/files`: one read-only file per digest, and `DIGEST.part` of files that are still being received."""

    def __init__(self, prefix: Path) -> None:
        self.folder = prefix / FOLDER

    def path(self, sha256: str) -> Path:
        """Where the file with this digest is, or would be."""
        return self.folder / sha256

    @property
    def total_bytes(self) -> int:
        """The size of all files, also of those that are still being received."""
        return sum(path.lstat().st_size for path in self._own())

    def has(self, file: KitFile) -> bool:
        """Whether the store has a file of this digest and size; the contents are not read."""
        path = self.path(file.sha256)
        return path.is_file() and path.stat().st_size == file.bytes

    def bytes_to_write(self, file: KitFile) -> int:
        """What is missing of a file."""
        return 0 if self.has(file) else max(0, file.bytes - self.part_bytes(file.sha256))

    def received(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Bytes already there, by digest, of the files with these digests and sizes. A whole file has its digest.

        Deletes damaged files, and the parts of other files: nobody will continue these.
        """
        for path in self._own():
            if path.suffix == _PART and path.stem not in sizes:
                path.unlink()
        counts = {sha256: self.bytes_of(sha256, size) for sha256, size in sizes.items()}
        return {sha256: count for sha256, count in counts.items() if count is not None}

    def part_bytes(self, sha256: str) -> int:
        """How much has arrived of a file that is not whole yet."""
        part = self._part(sha256)
        return part.stat().st_size if part.exists() else 0

    def fill(self, sha256: str, size: int, rest_from: Callable[[int], Iterable[bytes]], remedy: str) -> None:
        """Append the rest of a file to what the store has of it, compare the digest, and give the file its name.

        `rest_from` gives the bytes from an offset on. Raises UnreachableError if they end too early, and keeps what
        has arrived; VerificationError if they are more or the digest is wrong, and deletes it; OutOfSpaceError if the
        disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._part(sha256)
        with raising_out_of_space(part), part.open("a+b") as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            arrived = file.tell()
            try:
                for data in rest_from(arrived):
                    arrived += len(data)
                    if arrived > size:
                        break
                    file.write(data)
                    digest.update(data)
            finally:
                file.flush()
                os.fsync(file.fileno())
        if arrived < size:
            raise UnreachableError(f"{arrived} of {size} bytes of {sha256[:12]} arrived", remedy)
        if arrived > size or digest.hexdigest() != sha256:
            part.unlink()
            raise VerificationError(f"the bytes that arrived for {sha256[:12]} are damaged", remedy)
        part.rename(self.path(sha256))
        # Not before: a part of a file that was cut off here could not be opened again.
        self.path(sha256).chmod(0o444)
        flush_to_disk(self.folder)

    def receive(self, sha256: str, size: int, rest_from: Callable[[int], Iterable[bytes]], remedy: str) -> None:
        """`fill`, which goes on where a connection was lost; UnreachableError after three with little new in a row."""
        self.fill(sha256, size, lambda start: _resumed(rest_from, start, size), remedy)

    def put(self, file: KitFile, kit: Path) -> None:
        """Make sure that the store has the file, with the right contents; copies it from the kit's folder if not.

        Raises VerificationError for a damaged file, NotFoundError if neither has it, OutOfSpaceError if the disk is
        full.
        """
        if self.bytes_of(file.sha256, file.bytes) == file.bytes:
            return
        source = kit / file.path
        if not source.is_file():
            raise NotFoundError(f"{file.path} is missing from the kit {kit}", COPY_AGAIN)
        # What a copy that was cut off has left may be of a damaged kit.
        self._part(file.sha256).unlink(missing_ok=True)
        try:
            self.fill(file.sha256, file.bytes, lambda _: _blocks(source), COPY_AGAIN)
        except (UnreachableError, VerificationError) as error:
            raise _damaged(file) from error

    def sweep(self, kept: Iterable[str]) -> None:
        """Delete all files but those with the digests in `kept`, whole or in part."""
        keep = set(kept)
        for path in self._own():
            if path.name.removesuffix(_PART) not in keep:
                path.unlink()

    def bytes_of(self, sha256: str, size: int) -> int | None:
        """The bytes of a file that are there; None without any."""
        whole, part = self.path(sha256), self._part(sha256)
        for path in (whole, part):
            _remove_other_than_file(path)
        if whole.exists() and sha256_of(whole) != sha256:
            whole.unlink()
        if not whole.exists() and part.exists() and part.stat().st_size >= size:
            # The device stopped between the last byte and the new name.
            with suppress(VerificationError):
                self.fill(sha256, size, lambda _: (), "")
        if whole.exists():
            return size
        return part.stat().st_size if part.exists() else None

    def _own(self) -> list[Path]:
        """The store's files, whole or in part: a prefix may be a folder in which a user has others."""
        return [path for path in self.folder.glob("*") if DIGEST.fullmatch(path.name.partition(".")[0])]

    def _part(self, sha256: str) -> Path:
        return self.folder / f"{sha256}{_PART}"


def check_file(path: Path, file: KitFile) -> None:
    """VerificationError unless the file has the size and the digest in the kit."""
    if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
        raise _damaged(file)


def _remove_other_than_file(path: Path) -> None:
    """Remove a link, which may lead to what is changed later, and what cannot be read as a file, such as a pipe."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or not path.is_file():
        path.unlink(missing_ok=True)


def _resumed(rest_from: Callable[[int], Iterable[bytes]], start: int, size: int) -> Iterator[bytes]:
    """The bytes from `start` on, of as many connections as it takes; the last one's UnreachableError, if it has one."""
    failed = 0
    while start < size:
        before, lost = start, None
        try:
            for data in rest_from(start):
                start += len(data)
                yield data
        except UnreachableError as error:
            lost = error
        failed = 0 if start - before >= _PROGRESS_BYTES else failed + 1
        if start < size and failed == _ATTEMPTS:
            if lost is not None:
                raise lost
            return


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            yield data


def _damaged(file: KitFile) -> VerificationError:
    return VerificationError(f"{file.path} of the kit does not have the digest in kit.json", COPY_AGAIN)
