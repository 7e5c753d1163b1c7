"""Receives the files that an install lacks from the host, and continues those that were cut off.

The board prints one line with what it lacks; the host then sends the rest of each file in this order.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from edgetune_runtime.store.files import Store
from edgetune_runtime.store.kit import Kit

from . import venv

LACKING = "lacking: "
"""Start of the line that lists as JSON the digests that the board lacks, with the bytes that it has of each."""
STALLED_S = 60.0
"""Seconds without a byte from the host after which the connection is taken for dead."""
_CHUNK_BYTES = 1 << 18


def receive_lacking(prefix: Path, kit: Kit, source: IO[bytes], out: IO[str]) -> None:
    """Print the line of what an install of the kit lacks to `out`, and receive it from `source`.

    Raises what `receive` raises. Only one process may be installing.
    """
    lacking = missing(prefix, kit)
    print(f"{LACKING}{json.dumps(lacking)}", file=out, flush=True)
    sizes = {file.sha256: file.bytes for file in kit.files}
    for digest in lacking:
        receive(Store(prefix), digest, sizes[digest], source)


def missing(prefix: Path, kit: Kit) -> dict[str, int]:
    """Digest of each file that an install of the kit needs and the store lacks, and how many bytes it has of it."""
    sizes = {file.sha256: file.bytes for file in venv.needed_files(prefix, kit)}
    received = Store(prefix).received(sizes)
    return {digest: received.get(digest, 0) for digest, size in sizes.items() if received.get(digest) != size}


def receive(store: Store, digest: str, size: int, source: IO[bytes]) -> None:
    """Append the rest of a file from `source` to what the store has of it; reads no further, raises what `fill` does.

    The bytes have ended too early also if none comes for STALLED_S.
    """
    store.fill(digest, size, lambda offset: _parts(source, size - offset), "run the deploy again")


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
