"""edgetune's folder in the user's cache folder: the converter, and wheels for boards."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
from edgetune_runtime.errors import UsageError


def cache_folder() -> Path:
    """The folder, which may not exist yet."""
    return Path(platformdirs.user_cache_dir("edgetune"))


def make_in_cache(folder: Path) -> None:
    """Make this folder of the cache; UsageError, which says how to move the cache, if files cannot be written there."""
    cause = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = error
    if cause is not None or not os.access(folder, os.W_OK):
        remedy = "set XDG_CACHE_HOME to a folder that you may write to"
        raise UsageError(f"cannot write to the cache folder {folder}", remedy) from cause
