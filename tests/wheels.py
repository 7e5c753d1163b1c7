"""Wheels made from what is installed here, so that tests need no network."""

from __future__ import annotations

import zipfile
from importlib.metadata import distribution
from pathlib import Path

# What an installer adds to a wheel.
_ADDED = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}


def repack(name: str, folder: Path, tag: str | None = None) -> Path:
    """A wheel of an installed distribution, with the compatibility tag that it came with, or `tag`."""
    found = distribution(name)
    (info,) = {path.parent for path in found.files or () if path.name == "METADATA"}
    lines = (found.read_text("WHEEL") or "").splitlines()
    tags = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
    out = folder / f"{info.name.removesuffix('.dist-info')}-{tag or _compressed(tags)}.whl"
    paths = [path for path in found.files or () if ".." not in path.parts and "__pycache__" not in path.parts]
    kept = [path for path in paths if path.parent != info or path.name not in _ADDED]
    with zipfile.ZipFile(out, "w") as archive:
        for path in kept:
            archive.write(str(path.locate()), str(path))
        record = f"{info}/RECORD"
        # Without the time, so that the wheel is the same each time.
        archive.writestr(zipfile.ZipInfo(record), "".join(f"{path},,\n" for path in [*kept, record]))
    return out


def _compressed(tags: list[str]) -> str:
    """Several tags as one, as in a wheel's name."""
    parts = zip(*(tag.split("-") for tag in tags), strict=True)
    return "-".join(".".join(dict.fromkeys(part)) for part in parts)
