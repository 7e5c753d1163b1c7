"""Virtual environments of wheels, built in place and marked when complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError, NotFoundError

from .durable import write_text
from .kit import COPY_AGAIN, Kit
from .store import Store, check_file

FOLDER = "venvs"
_MARK = "complete"
_WHEELS = "wheels"
_PIP = ("install", "--no-index", "--no-deps", "--no-input", "--no-cache-dir", "--disable-pip-version-check")


def path_of(prefix: Path, wheels: str) -> Path:
    """The environment of the wheels with this id."""
    return prefix / FOLDER / wheels


def is_complete(prefix: Path, wheels: str) -> bool:
    """Whether the environment is there and its Python still exists."""
    folder = path_of(prefix, wheels)
    return (folder / _MARK).is_file() and (folder / "bin/python").exists()


def check_wheels(kit: Kit, folder: Path, store: Store) -> dict[str, Path]:
    """Name and path of each wheel, in the kit's folder or else in the store, after comparing its digest."""
    found = {}
    for file in kit.wheel_files:
        path = folder / file.path if (folder / file.path).is_file() else store.path(file.sha256)
        check_file(path, file)
        found[file.name] = path
    return found


def build(prefix: Path, kit: Kit, wheels: dict[str, Path]) -> None:
    """Install the wheels into a new environment at its final place, and mark it when it is on disk.

    The kit brings pip, as Debian's Python has none. An incomplete environment is built anew.
    """
    folder = path_of(prefix, kit.wheels)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    _call([sys.executable, "-I", "-m", "venv", "--without-pip", str(folder)])
    links = folder / _WHEELS
    links.mkdir()
    for name, path in wheels.items():
        # pip reads name and version from the file's name, which the store does not have.
        (links / name).symlink_to(path.resolve())
    pip = next((name for name in wheels if name.startswith("pip-")), None)
    if pip is None:
        raise NotFoundError("the kit has no wheel of pip", COPY_AGAIN)
    others = [str(links / name) for name in wheels if name != pip]
    _call([str(folder / "bin/python"), str(links / pip / "pip"), *_PIP, *others])
    shutil.rmtree(links)
    # One call: thousands of files, each flushed by itself, take minutes on an SD card.
    os.sync()
    write_text(folder / _MARK, f"{kit.wheels}\n")


def _call(command: list[str]) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    # Without the settings of a pip.conf either.
    clean["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        message = f"making the virtual environment failed: {lines[-1]}"
        raise IncompatibleError(message, "free some space, or report it with the output of board.pyz check")
