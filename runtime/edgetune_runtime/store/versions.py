"""The versions of a prefix: place one, switch to it by one rename, list them, and delete those that nobody needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError, VerificationError
from edgetune_runtime.formats.atomic import flush_to_disk, raising_out_of_space

from .durable import INSTALLING_NAME, flush_tree, replace_link, unfinished, write_text
from .files import Store
from .in_use import is_in_use
from .kit import ID, KIT_NAME, Kit, read_installed

ROOT_FOLDER, USER_FOLDER = "/opt/edgetune", ".local/share"
"""Where the bundles of root are installed, and, in their home, those of others without XDG_DATA_HOME."""
FOLDER = "versions"
ENVIRONMENTS = "venvs"
COMPLETE = "complete"
"""Mark of an environment that is complete."""
CURRENT = "current"
PREVIOUS = "previous"
KEPT = ".previous"
"""Target of `previous` before an unfinished switch."""
ROLLING_BACK = ".rollback"
"""Target of an unfinished rollback."""
LINKS = (CURRENT, PREVIOUS, KEPT, ROLLING_BACK)
RUN_SCRIPT = "bin/edgetune-run"
PREFIX_VARIABLE = "EDGETUNE_PREFIX"
"""Variable of the environment in which RUN_SCRIPT says which prefix it is of."""
Say = Callable[[str], None]
"""Prints a line for the user."""
_VENV = "venv"
_SCRIPT_START = "#!/bin/sh\n# Runs edgetune-run of the current version.\n"
# The link is resolved once, so that a switch in the middle of a start mixes no versions.
_SCRIPT = """\
version=$(readlink -f '{prefix}/current') || exit 3
export {variable}='{prefix}'
exec "$version/venv/bin/python" -I -m edgetune_runtime "$@"
"""


@dataclass(frozen=True)
class Installed:
    """One installed version; `state` is current, previous or empty."""

    kit: Kit
    state: str

    def to_json(self) -> dict[str, Any]:
        """The version as JSON values."""
        kit = self.kit
        return {"version": kit.version, "state": self.state, "bundle": kit.bundle, "engines": list(kit.engines)}


def default_prefix(name: str) -> Path:
    """The prefix of the bundle with this name."""
    if os.geteuid() == 0:
        return Path(ROOT_FOLDER, name)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / USER_FOLDER, "edgetune", name)


def directory(text: str) -> Path:
    """The value of --prefix; ValueError if it is empty, which Path takes for the current folder."""
    if not text:
        raise ValueError("it is empty")
    return Path(text)


def path_of(prefix: Path, version: str) -> Path:
    """The folder of a version."""
    return prefix / FOLDER / version


def environment(prefix: Path, wheels: str) -> Path:
    """The environment of the wheels with this id."""
    return prefix / ENVIRONMENTS / wheels


def environment_of(version: Path) -> str:
    """The id of the environment of the version in a folder."""
    return (version / _VENV).readlink().name


def has_environment(prefix: Path, wheels: str) -> bool:
    """Whether the environment is there and its Python still exists."""
    folder = environment(prefix, wheels)
    return (folder / COMPLETE).is_file() and (folder / "bin/python").exists()


def linked(prefix: Path, link: str) -> str | None:
    """The version that one of the links points to; None if there is none. UsageError for what no install has made."""
    path = prefix / link
    if not is_free(path):
        raise UsageError(f"{path} is not a link to a version", "choose another --prefix, or move it away")
    return path.readlink().name if path.exists() else None


def is_free(link: Path) -> bool:
    """Whether a path can become a link to a version: it is one, or is not there."""
    if not link.is_symlink():
        return not link.exists()
    folder, name = link.readlink().parent, link.readlink().name
    return folder == Path(FOLDER) and ID.fullmatch(name) is not None


def is_script_free(prefix: Path) -> bool:
    """Whether RUN_SCRIPT can be written or deleted: it is that of an install, or is not there."""
    path = prefix / RUN_SCRIPT
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SCRIPT_START)) == _SCRIPT_START.encode()


def require_free(prefix: Path) -> None:
    """UsageError for what others have in the place of the links, and, before the first version, of RUN_SCRIPT."""
    found = [linked(prefix, link) for link in LINKS]
    if not any(found) and not is_script_free(prefix):
        message = f"{prefix / RUN_SCRIPT} is not that of an install"
        raise UsageError(message, "choose another --prefix, or move it away")


def previous(prefix: Path) -> str | None:
    """The previous version, also if a switch was cut off between its two links; None if there is none."""
    version = linked(prefix, PREVIOUS)
    return linked(prefix, KEPT) if version == linked(prefix, CURRENT) else version


def before(prefix: Path) -> str | None:
    """The version that a rollback goes to, also one that was cut off; None without one."""
    return linked(prefix, ROLLING_BACK) or previous(prefix)


def place(prefix: Path, kit: Kit) -> bool:
    """Make the version's folder of hard links to the store, which must have its files; whether it changed.

    In versions that are there already, the files of this one are replaced that were damaged.
    """
    folder = path_of(prefix, kit.version)
    store = Store(prefix)
    described = folder.is_dir() and write_text(folder / KIT_NAME, kit.text)
    repaired = _repair(prefix, store, {file.sha256 for file in kit.version_files})
    if folder.is_dir():
        return described or repaired
    temporary = _hidden(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    with raising_out_of_space(folder):
        temporary.mkdir(parents=True)
        for file in kit.version_files:
            target = temporary / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(store.path(file.sha256), target)
        (temporary / _VENV).symlink_to(f"../../{ENVIRONMENTS}/{kit.wheels}")
        (temporary / KIT_NAME).write_bytes(kit.text.encode())
        flush_tree(temporary)
        temporary.rename(folder)
    flush_to_disk(folder.parent)
    return True


def _repair(prefix: Path, store: Store, digests: set[str]) -> bool:
    """Link the files with these digests to the store again, in all versions; whether one was not."""
    changed = False
    for folder in _folders(prefix):
        # One whose description is damaged is left for its own next install.
        with suppress(VerificationError):
            files = [file for file in read_installed(folder).version_files if file.sha256 in digests]
            for file in files:
                changed |= _relink(store.path(file.sha256), folder / file.path)
    return changed


def switch(prefix: Path, version: str) -> None:
    """Make `version` the current one and keep the one before as `previous`.

    `restore` undoes it until `settle` is called. If it is cut off, the current version is one of the two, and
    `previous` returns the one before it.
    """
    current = linked(prefix, CURRENT)
    if current == version:
        return
    _write_script(prefix)
    if current is not None:
        _point(prefix, KEPT, previous(prefix))
        # Before the switch: the version that runs now must be kept whenever the power is cut.
        _point(prefix, PREVIOUS, current)
    _point(prefix, CURRENT, version)


def restore(prefix: Path, links: Mapping[str, str | None]) -> None:
    """Point `current` and `previous` to the versions that they pointed to before a switch."""
    # In this order, so that `previous` returns the previous version at any time.
    for link in (CURRENT, PREVIOUS):
        _point(prefix, link, links[link])


def begin_rollback(prefix: Path, version: str) -> None:
    """Note that a rollback to `version` begins, so that the next one goes on with it if it is cut off."""
    _point(prefix, ROLLING_BACK, version)


def settle(prefix: Path) -> None:
    """Remove the traces of a switch that has ended or was cut off."""
    _point(prefix, PREVIOUS, previous(prefix))
    for link in (KEPT, ROLLING_BACK):
        _point(prefix, link, None)


def listing(prefix: Path, say: Say) -> list[Installed]:
    """The versions, the current one first, then the one before; warns of those with a damaged kit.json."""
    states = {previous(prefix): PREVIOUS, linked(prefix, CURRENT): CURRENT}
    order = {CURRENT: 0, PREVIOUS: 1, "": 2}
    kits = [kit for folder in _folders(prefix) if (kit := _readable(folder, say)) is not None]
    installed = [Installed(kit, states.get(kit.version, "")) for kit in kits]
    return sorted(installed, key=lambda item: (order[item.state], item.kit.version))


def sweep(prefix: Path, say: Say, expected: Iterable[str] = ()) -> None:
    """Delete versions other than the current one and the one before, and the files and environments they alone used.

    A version that a process has open stays until a later sweep, and so do files with the digests `expected`. If a
    version's kit.json is damaged, a warning is printed, and its folder and environment stay.
    """
    kept = {version for version in (linked(prefix, CURRENT), previous(prefix)) if version is not None}
    kept |= {folder.name for folder in _folders(prefix) if folder.name not in kept and is_in_use(folder)}
    folders = [path_of(prefix, version) for version in kept]
    _discard_others(prefix / FOLDER, kept)
    _discard_others(prefix / ENVIRONMENTS, set(map(environment_of, folders)))
    kits = [kit for folder in folders if (kit := _readable(folder, say)) is not None]
    Store(prefix).sweep({file.sha256 for kit in kits for file in kit.version_files} | {*expected})


def require_installed(prefix: Path) -> None:
    """NotFoundError if no install and no update has begun in this folder."""
    if not (prefix / INSTALLING_NAME).is_file() and not _folders(prefix):
        raise NotFoundError(f"nothing is installed in {prefix}", "give the --prefix of the install")


def discard_all(prefix: Path) -> None:
    """Delete all versions and what they used; the links to them too."""
    for link in (prefix / name for name in LINKS):
        for path in (link, unfinished(link)):
            if is_free(path):
                path.unlink(missing_ok=True)
    Store(prefix).sweep(())
    for folder in (ENVIRONMENTS, FOLDER):
        _discard_others(prefix / folder)


def _readable(folder: Path, say: Say) -> Kit | None:
    """The kit of an installed version; None, with a warning, if its kit.json is damaged."""
    try:
        return read_installed(folder)
    except (VerificationError, NotFoundError) as error:
        say(f"version {folder.name} is left out: {error}")
        return None


def _point(prefix: Path, link: str, version: str | None) -> None:
    """Make a link point to a version, or remove it; writes nothing if it does so already."""
    path = prefix / link
    if version is not None:
        if linked(prefix, link) != version:
            replace_link(path, f"{FOLDER}/{version}")
    elif path.is_symlink():
        path.unlink()
        flush_to_disk(prefix)


def _discard_others(root: Path, kept: Collection[str] = ()) -> None:
    # By their names: a prefix may be a folder in which a user has others.
    own = (path for path in root.glob("*") if ID.fullmatch(path.name.removeprefix(".")) and path.is_dir())
    # Sorted: hidden ones come first, which a deletion that was cut off has left where others are to be renamed to.
    for folder in sorted(path for path in own if path.name not in kept):
        # Renamed first: an interrupted deletion must not leave what looks like a whole folder.
        shutil.rmtree(folder if folder.name.startswith(".") else folder.rename(_hidden(folder)))


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}")


def _relink(source: Path, target: Path) -> bool:
    if target.exists() and target.samefile(source):
        return False
    temporary = _hidden(target)
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    temporary.replace(target)
    flush_to_disk(target.parent)
    return True


def _folders(prefix: Path) -> list[Path]:
    folders = (prefix / FOLDER).glob("*")
    return sorted(path for path in folders if ID.fullmatch(path.name) and (path / KIT_NAME).is_file())


def _write_script(prefix: Path) -> None:
    quoted = str(prefix.absolute()).replace("'", "'\\''")
    text = _SCRIPT.replace("{prefix}", quoted).replace("{variable}", PREFIX_VARIABLE)
    write_text(prefix / RUN_SCRIPT, _SCRIPT_START + text, mode=0o755)
