"""Virtual environments of wheels, built in place and marked when complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError, NotFoundError
from edgetune_runtime.store import versions
from edgetune_runtime.store.durable import write_text
from edgetune_runtime.store.files import Store
from edgetune_runtime.store.kit import COPY_AGAIN, Kit, KitFile

_WHEELS = "wheels"
_PIP = ("install", "--no-index", "--no-deps", "--no-input", "--no-cache-dir", "--disable-pip-version-check")


def needed_files(prefix: Path, kit: Kit) -> tuple[KitFile, ...]:
    """The files that an install of the kit needs: without the wheels if their environment is there."""
    return (*kit.version_files, *(() if versions.has_environment(prefix, kit.wheels) else kit.wheel_files))


def build(prefix: Path, kit: Kit, folder: Path) -> None:
    """Install the wheels of a kit into a new environment at its final place, and mark it when it is on disk.

    The wheels are copied from the kit's `folder` to the store, where nobody else writes, and compared with their
    digests there; errors as those of `Store.put`. The kit brings pip, as Debian's Python has none. An incomplete
    environment is built anew.
    """
    store = Store(prefix)
    for file in kit.wheel_files:
        store.put(file, folder)
    environment = versions.environment(prefix, kit.wheels)
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(exist_ok=True)
    _call([sys.executable, "-I", "-m", "venv", "--without-pip", str(environment)])
    links = environment / _WHEELS
    links.mkdir()
    for file in kit.wheel_files:
        # pip reads name and version from the file's name, which the store does not have.
        (links / file.name).symlink_to(store.path(file.sha256).resolve())
    names = [file.name for file in kit.wheel_files]
    pip = next((name for name in names if name.startswith("pip-")), None)
    if pip is None:
        raise NotFoundError("the kit has no wheel of pip", COPY_AGAIN)
    others = [str(links / name) for name in names if name != pip]
    _call([str(environment / "bin/python"), str(links / pip / "pip"), *_PIP, *others])
    shutil.rmtree(links)
    # One call: thousands of files, each flushed by itself, take minutes on an SD card.
    os.sync()
    write_text(environment / versions.COMPLETE, f"{kit.wheels}\n")


def _call(command: list[str]) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    # Without the settings of a pip.conf either.
    clean["PIP_CONFIG_FILE"] = os.devnull
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines() or [f"exit code {process.returncode}"]
        message = f"making the virtual environment failed: {lines[-1]}"
        raise IncompatibleError(message, "free some space, or report it with the output of board.pyz check")
