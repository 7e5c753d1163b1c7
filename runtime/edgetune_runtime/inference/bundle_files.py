"""Adds adapters to a bundle on disk and removes them: files first, then the manifest, whose rename decides."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path, PurePosixPath

from edgetune_runtime.bundle import (
    LONGEST_MANIFEST,
    MANIFEST_NAME,
    STATES_FOLDER,
    AdapterEntry,
    Manifest,
    NewAdapter,
    digest_of_model,
    read_manifest,
    resolve,
    verify_files,
    without_adapter,
)
from edgetune_runtime.bundle.lock import locked
from edgetune_runtime.bundle.parts import parts_in
from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.formats.atomic import flush_to_disk, replacing, require_space
from edgetune_runtime.formats.checked_file import read_about
from edgetune_runtime.states.store import KIND

from .adapter_changes import chosen_adapter, require_fits

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MANIFEST_BYTES = 1 << 20


def add_to_bundle(bundle: Path, source: Path, name: str | None, check: Callable[[str], object]) -> AdapterEntry:
    """Copy an adapter of the bundle `source` into another bundle on the same base; returns its new entry.

    `check` gets its name before anything is written, and raises what is wrong with it. Same errors as
    `Runtime.add_adapter`, BusyError while another process changes the bundle, and EdgetuneError where the system
    refuses; the bundle is then unchanged.
    """
    with _locked(bundle):
        manifest = read_manifest(bundle)
        new = chosen_adapter(read_manifest(source), source, name)
        entry, paths = moved(new, _folder_for(new, bundle, manifest))
        files = {paths[file]: about for file, about in new.files.items()}
        require_fits(NewAdapter(entry, files, bundle), manifest)
        _require_inside(bundle, files)
        verify_files(source, replace(manifest, files=new.files))
        check(entry.name)
        require_space(bundle / MANIFEST_NAME, _MANIFEST_BYTES + sum(about.bytes for about in files.values()))
        adapters = {**manifest.adapters, entry.name: entry}
        changed = replace(manifest, adapters=adapters, files={**manifest.files, **files})
        try:
            for file, path in paths.items():
                with replacing(bundle / path) as temporary:
                    shutil.copyfile(resolve(source, file), temporary)
            # The source may have changed since it was checked.
            verify_files(bundle, changed, files)
            _write(bundle, changed)
        except BaseException:
            _delete(bundle, paths.values())
            raise
    return entry


def remove_from_bundle(bundle: Path, name: str) -> Manifest:
    """Remove an adapter from a bundle on disk, with its states and all files that nothing else uses.

    Returns the manifest without it.
    NotFoundError for an unknown name, BusyError while another process changes the bundle, EdgetuneError where the
    system refuses.
    """
    with _locked(bundle):
        manifest = read_manifest(bundle)
        changed = without_adapter(manifest, name)
        states = _states_of(bundle, manifest, manifest.adapter(name))
        changed = replace(changed, files={file: about for file, about in changed.files.items() if file not in states})
        dropped = manifest.files.keys() - changed.files.keys()
        _require_inside(bundle, dropped)
        _write(bundle, changed)
        _delete(bundle, dropped)
    return changed


def moved(new: NewAdapter, folder: str) -> tuple[AdapterEntry, dict[str, str]]:
    """An adapter's entry with its files in a folder of a bundle, and the new path of each file."""
    common = os.path.commonpath([PurePosixPath(file).parent for file in new.files])
    paths = {file: f"{folder}/{PurePosixPath(file).relative_to(common)}" for file in new.files}
    entry = replace(
        new.entry,
        files={engine: paths[file] for engine, file in new.entry.files.items()},
        draft=None if new.entry.draft is None else paths[new.entry.draft],
        similarity=None if new.entry.similarity is None else paths[new.entry.similarity],
    )
    return entry, paths


def _folder_for(new: NewAdapter, bundle: Path, manifest: Manifest) -> str:
    """A folder of a bundle for an adapter, which nothing else uses."""
    name = new.entry.name
    plain = name if _PLAIN_NAME.fullmatch(name) else next(iter(new.files.values())).sha256[:16]
    used = {PurePosixPath(file).parts[1] for file in manifest.files if file.startswith("adapters/")}
    # A running process may still read the files of an adapter that had the name before.
    folders = chain([plain], (f"{plain}-{number}" for number in count(2)))
    folder = next(each for each in folders if each not in used and not (bundle / "adapters" / each).exists())
    return f"adapters/{folder}"


def _states_of(bundle: Path, manifest: Manifest, entry: AdapterEntry) -> set[str]:
    """The states in the bundle that an adapter computed."""
    digests = {digest_of_model(manifest.files, file) for file in entry.files.values()}
    states = set()
    for name in manifest.files:
        if name.startswith(f"{STATES_FOLDER}/"):
            about = read_about(resolve(bundle, name), KIND) or {}
            identity = json.dumps(about.get("identity"))
            if any(digest in identity for digest in digests):
                states.add(name)
    return states


def _require_inside(bundle: Path, names: Iterable[str]) -> None:
    """VerificationError if one of these files, or a part of an author, leads outside the bundle through a link."""
    for name in (*names, *parts_in(bundle)):
        resolve(bundle, name)


def _write(bundle: Path, manifest: Manifest) -> None:
    # With the adapters of authors as they are now, the manifest has all of it.
    text, parts = replace(manifest, authors={}).to_json().encode(), parts_in(bundle)
    if len(text) > LONGEST_MANIFEST:
        message = f"the manifest of {bundle} would have {len(text)} bytes, more than {LONGEST_MANIFEST}"
        raise UsageError(message, "remove other adapters first, or use a second bundle")
    with replacing(bundle / MANIFEST_NAME) as temporary:
        temporary.write_bytes(text)
    flush_to_disk(bundle)
    _delete(bundle, parts)


def _delete(bundle: Path, names: Iterable[str]) -> None:
    """Delete files that the manifest does not name, and folders that are empty without them."""
    for name in names:
        (bundle / name).unlink(missing_ok=True)
        for folder in (bundle / name).parents:
            # A device with one format may lack the folder of another.
            if folder == bundle or any(folder.glob("*")):
                break
            with suppress(FileNotFoundError):
                folder.rmdir()


@contextmanager
def _locked(bundle: Path) -> Iterator[None]:
    """Keep other processes from changing the bundle; BusyError if one does.

    EdgetuneError where the system refuses a change in the block.
    """
    try:
        with locked(bundle):
            yield
    except OSError as error:
        raise EdgetuneError(f"cannot change bundle {bundle}: {error}", "check the rights of its folder") from error
