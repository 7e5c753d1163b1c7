"""Kits without wheels, for boards that have the virtual environment already, so that tests need no network."""

from __future__ import annotations

import json
import sys
import sysconfig
import venv
from dataclasses import asdict
from pathlib import Path

import edgetune_runtime
from edgetune_runtime.bundle import MANIFEST_NAME, read_manifest, sha256_of

from edgetune.delivery.board.kit import BUNDLE_FOLDER, KIT_NAME, PROGRAM_NAME, SUMS_NAME
from edgetune.delivery.kit import output
from edgetune.delivery.kit.program import board_program

PYTHON = "{}.{}".format(*sys.version_info)
WHEELS = "0123456789abcdef"
"""The id of the wheels in the environment of `make_environment`."""


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees what is installed here, marked as one that a kit installed."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/*/site-packages")
    seen = (Path(*edgetune_runtime.__path__).parent, sysconfig.get_path("purelib"))
    (site / "here.pth").write_text("".join(f"{path}\n" for path in seen), encoding="utf-8")
    (folder / "complete").touch()
    return folder


def add_environment(environment: Path, prefix: Path) -> None:
    """Let a board have the environment."""
    (prefix / "venvs").mkdir(parents=True)
    (prefix / "venvs" / WHEELS).symlink_to(environment)


def write_kit(bundle: Path, out: Path, **changes: object) -> None:
    """Write the kit of a bundle for this machine to a folder; `changes` go into kit.json."""
    manifest = read_manifest(bundle)
    contents: dict[str, Path | bytes] = {
        f"{BUNDLE_FOLDER}/{name}": bundle / name for name in (*manifest.files, MANIFEST_NAME)
    }
    contents[PROGRAM_NAME] = board_program()
    files = output.listed(contents)
    described = {
        "schema": 1,
        "name": manifest.name,
        "board": "laptop",
        "machine": "x86_64",
        "python": PYTHON,
        "engines": list(manifest.base.files)[:1],
        "needs": {"instructions": [], "glibc": "2.0", "ram_mb": 1, "packages_mb": 1},
        "wheels": WHEELS,
        "bundle": sha256_of(bundle / MANIFEST_NAME),
        "service": {"port": 8080, "memory_max_mb": 100},
        "files": [asdict(file) for file in files],
        **changes,
    }
    contents[KIT_NAME] = json.dumps(described, sort_keys=True).encode()
    contents[SUMS_NAME] = output.sums(files, contents[KIT_NAME])
    output.write(contents, out, manifest.name)
