"""Receives the files that an install lacks from the host, and continues those that were cut off.

The board prints one line with what it lacks; the host then sends the rest of each file in this order. A file is
`DIGEST` in the store when it is whole, and `DIGEST.part` until then.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.atomic import raising_out_of_space

from . import venv
from .errors import UnreachableError
from .kit import Kit
from .store import PART, Store

LACKING = "lacking: "
"""Start of the line that lists as JSON the digests that the board lacks, with the bytes that it has of each."""
STALLED_S = 60.0
"""Seconds without a byte from the host after which the connection is taken for dead."""
_CHUNK_BYTES = 1 << 18


def receive_lacking(prefix: Path, kit: Kit, source: IO[bytes], out: IO[str]) -> None:
    """Print the line of what an install of the kit lacks to `out`, and receive it from `source`.

    Raises what `receive` raises. The lock of the prefix must be held.
    """
    lacking = missing(prefix, kit)
    print(f"{LACKING}{json.dumps(lacking)}", file=out, flush=True)
    sizes = {file.sha256: file.bytes for file in kit.files}
    for digest in lacking:
        receive(Store(prefix), digest, sizes[digest], source)


def missing(prefix: Path, kit: Kit) -> dict[str, int]:
    """Digest of each file that an install of the kit needs and the store lacks, and how many bytes it has of it."""
    sizes = {file.sha256: file.bytes for file in venv.needed_files(prefix, kit)}
    received = have(Store(prefix), sizes)
    return {digest: received.get(digest, 0) for digest, size in sizes.items() if received.get(digest) != size}


def have(store: Store, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes already received, by digest; `sizes` are those of the whole files.

    A file that is whole has the right digest. Deletes damaged files, and the parts of other files: nobody will continue
    these.
    """
    for path in store.folder.glob(f"*{PART}"):
        if path.stem not in sizes:
            path.unlink()
    received = {digest: _bytes_of(store, digest, size) for digest, size in sizes.items()}
    return {digest: count for digest, count in received.items() if count is not None}


def receive(store: Store, digest: str, size: int, source: IO[bytes]) -> None:
    """Append the rest of a file from `source` to its part; then check the digest and give it its name.

    Reads no further. Raises UnreachableError if the bytes end or stop before, and keeps the part;
    VerificationError if the digest is wrong, and deletes it; OutOfSpaceError if the disk is full.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    part = store.part(digest)
    with raising_out_of_space(part), part.open("ab") as file:
        try:
            for data in _parts(source, size - file.tell()):
                file.write(data)
        finally:
            file.flush()
            os.fsync(file.fileno())
        if file.tell() < size:
            raise UnreachableError(f"{file.tell()} of {size} bytes of {digest[:12]} arrived", "run the deploy again")
        if sha256_of(part) != digest:
            part.unlink()
            raise VerificationError(f"the bytes that arrived for {digest[:12]} are damaged", "run the deploy again")
        store.complete(digest)


def _bytes_of(store: Store, digest: str, size: int) -> int | None:
    """The bytes that the store has of a file, None if it has none of it."""
    whole, part = store.path(digest), store.part(digest)
    if not whole.exists() and part.exists() and part.stat().st_size >= size:
        # The board stopped between the last byte and the new name.
        store.complete(digest)
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
