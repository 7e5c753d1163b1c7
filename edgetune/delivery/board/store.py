"""The files of a prefix by their digest, which its versions share through hard links."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import NotFoundError, VerificationError
from edgetune_runtime.formats.atomic import flush_to_disk, replacing

from .kit import COPY_AGAIN, KitFile

FOLDER = "files"
PART = ".part"
_CHUNK_BYTES = 1 << 20


class Store:
    """`PREFIX/files`: one read-only file per digest, and `DIGEST.part` of files that are still being received."""

    def __init__(self, prefix: Path) -> None:
        self.folder = prefix / FOLDER

    def path(self, sha256: str) -> Path:
        """Where the file with this digest is, or would be."""
        return self.folder / sha256

    def has(self, file: KitFile) -> bool:
        """Whether the store has a file of this digest and size; the contents are not read."""
        path = self.path(file.sha256)
        return path.is_file() and path.stat().st_size == file.bytes

    def part(self, sha256: str) -> Path:
        """Where the part of a file is while it is received."""
        return self.folder / f"{sha256}{PART}"

    def bytes_to_write(self, file: KitFile) -> int:
        """What is missing of a file."""
        part = self.part(file.sha256)
        return 0 if self.has(file) else max(0, file.bytes - (part.stat().st_size if part.exists() else 0))

    def put(self, file: KitFile, kit: Path) -> None:
        """Make sure that the store has the file, with the right contents; copies it from the kit's folder if not.

        Raises VerificationError for a damaged file, NotFoundError if neither has it, OutOfSpaceError if the disk is
        full.
        """
        if self.has(file):
            if sha256_of(self.path(file.sha256)) == file.sha256:
                return
            self.path(file.sha256).unlink()
        source = kit / file.path
        if not source.is_file():
            raise NotFoundError(f"{file.path} is missing from the kit {kit}", COPY_AGAIN)
        with replacing(self.path(file.sha256)) as temporary:
            _copy(source, temporary, file)
            temporary.chmod(0o444)
        flush_to_disk(self.folder)

    def complete(self, sha256: str) -> None:
        """Give a received part, which must be whole, the name of its file."""
        part = self.part(sha256)
        part.chmod(0o444)
        part.rename(self.path(sha256))
        flush_to_disk(self.folder)

    def discard(self, files: Iterable[KitFile]) -> None:
        """Delete these files."""
        for file in files:
            self.path(file.sha256).unlink(missing_ok=True)

    def sweep(self, kept: Iterable[str]) -> None:
        """Delete all files but those with the digests in `kept`."""
        keep = set(kept)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in keep:
                path.unlink()


def check_file(path: Path, file: KitFile) -> None:
    """VerificationError unless the file has the size and the digest in the kit; NotFoundError if there is none."""
    if not path.is_file():
        raise NotFoundError(f"{file.path} is missing from the kit", COPY_AGAIN)
    if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
        raise _damaged(file)


def _copy(source: Path, out: Path, file: KitFile) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as reading, out.open("wb") as writing:
        while data := reading.read(_CHUNK_BYTES):
            digest.update(data)
            writing.write(data)
        os.fsync(writing.fileno())
    if digest.hexdigest() != file.sha256:
        raise _damaged(file)


def _damaged(file: KitFile) -> VerificationError:
    return VerificationError(f"{file.path} of the kit does not have the digest in kit.json", COPY_AGAIN)
