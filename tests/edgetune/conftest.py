"""Tiny bases as the trainer takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgetune.bases import Base


@pytest.fixture(scope="session")
def tiny_base(tiny_gguf: Callable[[str], Path]) -> Callable[[str], Base]:
    """`tiny_base(arch)`: the f16 GGUF of a tiny base, resolved."""
    from edgetune.bases import resolve  # noqa: PLC0415 - only where a test needs a base
    from edgetune.progress import Progress  # noqa: PLC0415

    def make(arch: str) -> Base:
        path = tiny_gguf(arch)
        quiet = Progress(quiet=True)
        return resolve(str(path), folder=Path(), quantize=None, work=path.parent, progress=quiet, converter=None)

    return cache(make)
