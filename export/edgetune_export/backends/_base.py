"""What a backend takes and gives: a folded adapter and a base file in, one file of the backend's format out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgetune_export.fold import LowRank


class Backend(Protocol):
    """A module of this package, named after the format that it writes.

    `SHAPES` names the adapter shapes that `write_adapter` accepts; an adapter of another shape has to be merged.
    `SUPPORTED` names the base architectures.
    """

    SHAPES: tuple[str, ...]
    SUPPORTED: tuple[str, ...]

    def write_adapter(
        self, adapter: LowRank, base: Path, out: Path, *, dtype: str = "f16", base_fingerprint: str
    ) -> None:
        """Write the adapter of `base` to `out`; IncompatibleError names what of it does not fit the base."""

    def write_merged(self, adapter: LowRank, base: Path, out: Path, scale: float = 1.0) -> None:
        """Write a copy of `base` with `scale` times the adapter added to its weights."""
