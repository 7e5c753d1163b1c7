"""Tiny bases as the trainer takes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from edgetune_devices import boards

if TYPE_CHECKING:
    from edgetune.bases import Base


@pytest.fixture(scope="session")
def tiny_base(tiny_gguf: Callable[[str], Path]) -> Callable[[str], Base]:
    """`tiny_base(arch)`: the f16 GGUF of a tiny base, resolved."""
    from edgetune.bases import resolve  # noqa: PLC0415 - only where a test needs a base
    from edgetune.common.progress import Progress  # noqa: PLC0415

    def make(arch: str) -> Base:
        path = tiny_gguf(arch)
        quiet = Progress(quiet=True)
        return resolve(str(path), folder=Path(), quantization=None, work=path.parent, progress=quiet, converter=None)

    return cache(make)


@pytest.fixture
def slow_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`slow_board(**changes)`: the name of a Pi 5 whose memory is so slow that a tiny base gets 4 bits."""

    def make(**changes: object) -> str:
        text = (boards.FOLDER / "pi-5.toml").read_text(encoding="utf-8")
        for key, value in {"bandwidth_gb_per_s": 1e-5, **changes}.items():
            text = re.sub(rf"^{key} = .*\n", f"{key} = {value}\n", text, count=1, flags=re.MULTILINE)
        (tmp_path / "slow.toml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(boards, "FOLDER", tmp_path)
        return "slow"

    return make
