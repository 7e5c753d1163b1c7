"""Builds the wheel of the host's llama-cpp-python version for another processor, and keeps it in the cache folder."""

from __future__ import annotations

from pathlib import Path

from edgetune.progress import Progress


def llama_wheel(platform: str, *, progress: Progress) -> Path:
    """The wheel for `platform`, a name in `PLATFORMS`: from edgetune's cache folder, or built with zig and kept there.

    The first build takes some minutes; a second process waits for the first. The same version, platform and compiler
    give the same bytes.

    Raises UsageError for an unknown platform, IncompatibleError if zig, CMake or Ninja is missing or the compiler
    fails, NotFoundError if pip cannot download the source.
    """
    raise NotImplementedError
