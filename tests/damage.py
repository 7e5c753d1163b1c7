"""Damaged files."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, place: float, bit: int = 0) -> None:
    """Change a bit of the byte at a place, or at a fraction of a file, and not of files that it is linked to."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1 << bit
    path.unlink()
    path.write_bytes(data)
