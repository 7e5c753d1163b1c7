"""Opens regular files only: opening a pipe waits for somebody who writes to it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgetune_runtime.errors import NotFoundError, VerificationError


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The regular file at `path`, for a block that reads it.

    NotFoundError if there is none, VerificationError for anything else and for one that cannot be read.
    """
    try:
        with open_regular(path, follows_links=True) as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"no file {path}", "check the path") from error
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}" if error.strerror else str(error)
        raise VerificationError(message, "give the file itself, and check its permissions") from error


def read_up_to(path: Path, most_bytes: int) -> bytes | None:
    """The contents of a regular file, None if it is longer; errors as of `reading`."""
    with reading(path) as file:
        data = file.read(most_bytes + 1)
    return data if len(data) <= most_bytes else None


def open_regular(path: Path, *, follows_links: bool) -> BinaryIO:
    """The regular file at `path`, opened for reading; OSError for anything else."""
    # Windows has no such files, and no such flags but the first.
    flags = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= 0 if follows_links else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(f"{path} is not a regular file")
