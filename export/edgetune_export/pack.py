"""Packs staged files and a manifest into a bundle, with digests; an atomic rename makes it appear complete or not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from edgetune_runtime.bundle import (
    MANIFEST_NAME,
    STATES_FOLDER,
    Manifest,
    entry_of,
    parse_manifest,
    read_manifest,
)
from edgetune_runtime.bundle.lock import locked
from edgetune_runtime.bundle.signatures import unlisted
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.formats.atomic import TEMPORARY, raising_out_of_space, require_space, swap_in
from edgetune_runtime.store.durable import flush_tree

PARTS = ("base", "adapters", "authors")

Complete = Callable[[Path, Manifest], Manifest]
"""Gets a bundle that can be opened, may add files to it, and returns its manifest."""

Check = Callable[[Manifest], None]
"""Raises an error if the bundle must not be packed; called before the steps, and when nothing else can change `out`."""

# Space for the manifest, the folders and file system metadata.
_MARGIN_BYTES = 1 << 20
# File systems take 255 bytes, of which `.NAME.tmp-PROCESS` needs 13 for more than the name.
_LONGEST_NAME = 242
# Of the files in an adapter's folder.
_ADAPTER_SUFFIXES = (".gguf", ".onnx", ".data", ".onnx_adapter", ".bin", ".json", ".jinja")


def pack(
    work: Path, out: Path, manifest: Manifest, steps: Sequence[Complete] = (), check: Check = lambda _: None
) -> Path:
    """Write the bundle `out` from all files in the folders PARTS of `work`, and those that the `steps` add in turn.

    Fills in `manifest.files`; links to files are followed. An existing bundle is replaced. Raises UsageError if `out`
    is anything else (see `check_destination`), VerificationError if the manifest names files that were not staged,
    OutOfSpaceError if the disk is full, BusyError if another process changes `out`, and what a step or `check` raises;
    `out` is then unchanged.
    """
    check_destination(out)
    with folder_beside(out) as temporary:
        staged = _staged_files(work)
        require_space(out, _MARGIN_BYTES + sum(path.stat().st_size for path in staged.values()))
        filled = _fill(temporary, staged, manifest)
        check(filled)
        for step in steps:
            filled = _write_manifest(temporary, step(temporary, filled))
        flush_tree(temporary)
        with locked(out):
            check(filled)
            swap_in(temporary, out)
    return out


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` for a block that then swaps it in; it is deleted if the block fails.

    First deletes what killed processes have left. OutOfSpaceError if the disk is full.
    """
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        with raising_out_of_space(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _clean_up(out)
            temporary.mkdir()
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_destination(out: Path) -> None:
    """UsageError unless `out` does not exist, is an empty folder, or is a bundle without other files in it.

    UsageError for a name that is too long, below a file or in a bundle, and for the current folder, too. What killed
    changes of a bundle have left in it counts as its own.
    """
    if (length := len(os.fsencode(out.name))) > _LONGEST_NAME:
        message = f"the name of {out} has {length} bytes, more than {_LONGEST_NAME}"
        raise UsageError(message, "choose a shorter one")
    if any(folder.exists() and not folder.is_dir() for folder in out.parents):
        raise UsageError(f"{out} is below a file", "choose another folder")
    check_not_in_bundle(out)
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} is not a folder", "choose another folder")
    check_not_current(out)
    if not any(out.iterdir()):
        return
    require_own_files(out, "bundle", _files_of_bundle)


def check_not_in_bundle(out: Path) -> None:
    """UsageError for a path in a bundle, which could not be replaced any more."""
    with suppress(FileNotFoundError):  # a deleted folder has no path any more
        bundle = next(filter(_is_bundle, out.resolve().parents), None)
        if bundle is not None:
            raise UsageError(f"{out} is inside the bundle {bundle}", "choose another folder")


def _is_bundle(folder: Path) -> bool:
    """Whether it has a manifest of a bundle; other programs have files of this name too."""
    if not (folder / MANIFEST_NAME).is_file():
        return False
    with suppress(EdgetuneError):
        read_manifest(folder)
        return True
    return False


def require_own_files(out: Path, kind: str, own_files: Callable[[Path], Collection[str]]) -> None:
    """UsageError if a folder has other files than its own: those that it has as one of this kind, a bundle or a kit."""
    try:
        foreign = sorted(files_below(out) - {*own_files(out)})
    except EdgetuneError as error:
        remedy = "choose another folder, or delete that one first"
        raise UsageError(f"{out} exists and is not a {kind} of this version", remedy) from error
    if foreign:
        message = f"{out} contains files that are not part of the {kind}, such as {foreign[0]}"
        raise UsageError(message, "move them away or choose another folder")


def check_not_current(out: Path) -> None:
    """UsageError for the current folder and those above it: the shell would stay in the one that is deleted."""
    with suppress(FileNotFoundError):  # a deleted folder has no path any more
        if out.resolve() in (Path.cwd(), *Path.cwd().parents):
            message = f"{out} is the folder that you are in, or one above it, and would be replaced"
            raise UsageError(message, "choose another folder, or run this elsewhere")


def _files_of_bundle(out: Path) -> set[str]:
    existing = files_below(out)
    listed = {*read_manifest(out).files, *unlisted(existing)}
    # Also the files of adapters that parts are in place of.
    listed |= {*parse_manifest((out / MANIFEST_NAME).read_bytes(), out / MANIFEST_NAME).files}
    return listed | {name for name in existing if _may_be_left_over(name, listed)}


def _may_be_left_over(name: str, listed: Collection[str]) -> bool:
    """Whether a killed change may have left a file that is not listed: a temporary one, a state, or a whole adapter."""
    path = PurePosixPath(name)
    if path.name.startswith(".") and TEMPORARY in path.name:
        return True
    if path.parts[0] == "adapters" and (len(path.parts) < 3 or path.suffix not in _ADAPTER_SUFFIXES):
        return False
    folder = "/".join(path.parts[:2])
    return path.parts[0] in ("adapters", STATES_FOLDER) and not any(each.startswith(f"{folder}/") for each in listed)


def _staged_files(work: Path) -> dict[str, Path]:
    """The files to pack, by their path in the bundle, with slashes."""
    return {name: work / name for part in PARTS for name in sorted(files_below(work / part, part))}


def files_below(folder: Path, prefix: str = "") -> set[str]:
    """The files in a folder and the folders below it, by their paths in it, with slashes, behind `prefix`."""
    names = (Path(root, name) for root, _, files in os.walk(folder) for name in files)
    return {Path(prefix, path.relative_to(folder)).as_posix() for path in names}


def _fill(folder: Path, staged: Mapping[str, Path], manifest: Manifest) -> Manifest:
    for name, source in staged.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Copy, never link: changes to a bundle must not affect the user's base or the files that a build resumes from.
        shutil.copyfile(source, target)
    return _write_manifest(folder, replace(manifest, files={}))


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write and check the manifest of the files in `folder`, with the digests of those that it does not list yet."""
    files = dict(manifest.files)
    for name in sorted(files_below(folder) - {*files, MANIFEST_NAME}):
        files[name] = entry_of(folder / name)
    (folder / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    return read_manifest(folder)


def _clean_up(out: Path) -> None:
    """Delete what killed processes have left of `out` beside it, and restore a folder that one of them had renamed."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(?P<kind>tmp|old)-(?P<process>\d+)")
    for path in list(out.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or _is_running(int(match["process"])):
            continue
        if match["kind"] == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # left by an earlier process with the same id
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs as another user
    return True
