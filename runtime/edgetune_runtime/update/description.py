"""Describes the version that a release becomes on this device: its bundle, in the environment that is there."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import FileEntry
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.store import versions
from edgetune_runtime.store.durable import write_text
from edgetune_runtime.store.kit import BUNDLE_FOLDER, SCHEMA_VERSION, Kit, KitFile, parse_kit, wheels_id
from edgetune_runtime.store.service import PORT

from .release import Release

_MEMORY_MAX_MB = 10**6
"""The unit's limit of memory where no kit has predicted it."""
_PYTHON = """\
#!/bin/sh
# Runs the Python that has edgetune-runtime.
exec '{python}' "$@"
"""


def describe(release: Release, current: Kit | None) -> Kit:
    """The version of a release in the environment of the current version, or in that of this Python if there is none.

    It is opened, and served, as the current version is. IncompatibleError if the release is without its engine.
    """
    require_engine(release.formats, current)
    raw = _of_this_python(release) if current is None else json.loads(current.text)
    engine = raw["engines"][0]
    kept = [file for file in raw["files"] if not file["path"].startswith(f"{BUNDLE_FOLDER}/")]
    files = [
        *kept,
        *({"path": f"{BUNDLE_FOLDER}/{path}", **vars(entry)} for path, entry in sorted(release.files.items())),
    ]
    # What opens the version is its first engine.
    raw |= {
        "engines": sorted(release.formats, key=lambda name: name != engine),
        "name": release.name,
        "bundle": release.bundle,
        "files": files,
        "release": release.version,
    }
    return parse_kit(json.dumps(raw, indent=1, sort_keys=True) + "\n")


def require_engine(formats: Sequence[str], current: Kit | None) -> None:
    """IncompatibleError if the formats to download lack the engine of the current version."""
    if current is not None and current.engines[0] not in formats:
        engine = current.engines[0]
        message = f"this device opens {engine}, and the formats to download are {', '.join(formats)}"
        raise IncompatibleError(message, f"add {engine} to --formats, or deploy a kit for another engine")


def text_of_release(kit: Kit, channel: str) -> str:
    """A release with the bundle of a version, of which the repository's text may have pieces."""
    files = {
        file.path.removeprefix(f"{BUNDLE_FOLDER}/"): FileEntry(file.sha256, file.bytes) for file in kit.bundle_files
    }
    return Release(kit.name, channel, kit.release, files, kit.engines, manifest_schema=1).to_json()


def make_environment(prefix: Path, kit: Kit) -> None:
    """Make the environment of a version that no kit has brought: a script that runs this Python."""
    if kit.wheel_files:
        return
    folder = versions.environment(prefix, kit.wheels)
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    quoted = sys.executable.replace("'", "'\\''")
    write_text(folder / "bin/python", _PYTHON.replace("{python}", quoted), mode=0o755)


def _of_this_python(release: Release) -> dict[str, Any]:
    python = ".".join(map(str, sys.version_info[:2]))
    no_files: list[KitFile] = []
    return {
        "schema": SCHEMA_VERSION,
        "board": "this device",
        "machine": platform.machine().lower(),
        "python": python,
        "engines": [release.formats[0]],
        "needs": {"instructions": [], "glibc": "0.0", "ram_mb": 0, "packages_mb": 0},
        "wheels": wheels_id(python, no_files),
        "service": {"port": PORT, "memory_max_mb": _MEMORY_MAX_MB},
        "files": no_files,
    }
