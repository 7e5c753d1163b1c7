"""edgetune's folder in the user's cache folder: the converter, and wheels for boards."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import platformdirs
from edgetune_runtime.errors import UsageError


def cache_folder() -> Path:
    """The folder, which may not exist yet. XDG_CACHE_HOME moves it on all systems."""
    moved = os.environ.get("XDG_CACHE_HOME")
    return Path(moved, "edgetune") if moved else Path(platformdirs.user_cache_dir("edgetune"))


def make_in_cache(folder: Path) -> None:
    """Make this folder of the cache; UsageError, which says why and how to move it, if one cannot write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        message = f"cannot write to the cache folder {folder}: {error.strerror}"
        raise UsageError(message, "set XDG_CACHE_HOME to another folder") from error
