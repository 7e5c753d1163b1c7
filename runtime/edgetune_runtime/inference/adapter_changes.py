"""Adds adapters to a running bundle and removes them, with the checks that opening makes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edgetune_runtime.bundle import (
    ROUTER_WORDS,
    Manifest,
    NewAdapter,
    files_beside,
    files_of,
    verify_files,
    without_adapter,
)
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, first_of

from .loaded import LoadedBundle
from .opening_options import file_of
from .preflight import require_opens

_LOG = logging.getLogger(__name__)


class AdapterChanges(NamedTuple):
    """The names of adapters that were added, replaced and removed, and of those that could not be, with the reason."""

    added: list[str]
    replaced: list[str]
    removed: list[str]
    refused: dict[str, str]


def chosen_adapter(manifest: Manifest, folder: Path, name: str | None) -> NewAdapter:
    """The adapter of a bundle with this name, or its only one; UsageError if it has others too."""
    if name is None and len(manifest.adapters) != 1:
        names = first_of([*manifest.adapters], 20, ", ") or "none"
        raise UsageError(f"bundle {folder} has {len(manifest.adapters)} adapters", f"name one of: {names}")
    entry = manifest.adapter(name or next(iter(manifest.adapters)))
    if not entry.files:
        raise VerificationError(f"adapter {entry.name!r} of bundle {folder} has no file", COPY_BUNDLE_AGAIN)
    return NewAdapter(entry, {file: manifest.files[file] for file in files_of(manifest, entry)}, folder)


def require_fits(new: NewAdapter, manifest: Manifest) -> None:
    """Raise UsageError or IncompatibleError unless an adapter can be in the bundle with this manifest."""
    name, base = new.entry.name, manifest.base
    if name in manifest.adapters:
        raise UsageError(f"bundle {manifest.name!r} has an adapter {name!r} already", "remove that one first")
    if manifest.router is not None and name in ROUTER_WORDS:
        message = f"the router of bundle {manifest.name!r} has another meaning for the adapter's name {name!r}"
        raise UsageError(message, "build it under another name")
    if new.entry.base_fingerprint != base.fingerprint:
        message = f"adapter {name!r} was made for another base than {base.name!r} of bundle {manifest.name!r}"
        raise IncompatibleError(message, "build it for this base")
    for file, entry in new.files.items():
        if manifest.files.get(file, entry) != entry:
            message = f"file {file} of adapter {name!r} has the name of another file in bundle {manifest.name!r}"
            raise UsageError(message, "build the adapter under another name")


def add_adapter(loaded: LoadedBundle, folder: Path, name: str | None) -> str:
    """Add an adapter of the bundle in `folder`, check it and load it; see `Runtime.add_adapter`."""
    new = chosen_adapter(read_signed_manifest(folder, loaded.options.trusted_keys), folder, name)
    with loaded.changing():
        _require_sound(loaded, new)
        _add(loaded, new)
    return new.entry.name


def reload(loaded: LoadedBundle, folder: Path) -> AdapterChanges:
    """Take over the bundle in `folder`; see `Runtime.reload`."""
    with loaded.changing():
        now, changes = read_signed_manifest(folder, loaded.options.trusted_keys), AdapterChanges([], [], [], {})
        _require_same_base(loaded, folder, now)
        for name in [name for name in loaded.files.own() if name not in now.adapters]:
            loaded.drop(name)
            changes.removed.append(name)
        for new in _changed(loaded, folder, now):
            name, is_there = new.entry.name, new.entry.name in loaded.manifest.adapters
            try:
                _require_sound(loaded, new, replaces=is_there)
                if is_there:
                    _replace(loaded, new)
                else:
                    _add(loaded, new)
            except EdgetuneError as error:
                changes.refused[name] = str(error)
            else:
                (changes.replaced if is_there else changes.added).append(name)
        loaded.move(folder, now, changes.refused)
    return changes


def _require_same_base(loaded: LoadedBundle, folder: Path, now: Manifest) -> None:
    """IncompatibleError if the base in memory is not the one of the bundle in `folder`."""
    before = loaded.manifest
    file = before.base.files[loaded.options.engine]
    names = files_beside(before, file)
    if now.base != before.base or any(now.files.get(name) != before.files[name] for name in names):
        raise IncompatibleError(f"bundle {folder} has another base than before", "open it again, or restart the server")


def _changed(loaded: LoadedBundle, folder: Path, now: Manifest) -> Iterator[NewAdapter]:
    """The adapters of the bundle in `folder` that differ from those that there are."""
    before = loaded.manifest
    for name, entry in now.adapters.items():
        new = chosen_adapter(now, folder, name)
        if before.adapters.get(name) != entry or any(before.files.get(file) != new.files[file] for file in new.files):
            yield new


def _require_sound(loaded: LoadedBundle, new: NewAdapter, *, replaces: bool = False) -> None:
    """Check an adapter as opening a bundle with it would."""
    manifest, options = loaded.manifest, loaded.options
    require_fits(new, without_adapter(manifest, new.entry.name) if replaces else manifest)
    file_of(new.entry.files, options.engine, f"adapter {new.entry.name!r}")
    loaded.require_room(new)
    if options.verify:
        verify_files(new.folder, replace(manifest, files=new.files))
    if options.preflight:
        require_opens(loaded.folder, manifest, options, added=new)


def _replace(loaded: LoadedBundle, new: NewAdapter) -> None:
    """Put an adapter in the place of the one of its name, which stays if the new one cannot be loaded."""
    name = new.entry.name
    before = chosen_adapter(loaded.manifest, loaded.files.folder_of(name), name)
    with loaded.replaced.replacing(name):
        loaded.drop(name)
        try:
            _add(loaded, new)
        except BaseException:
            loaded.add(before)
            with suppress(EdgetuneError):
                loaded.load(before.entry)
            raise


def _add(loaded: LoadedBundle, new: NewAdapter) -> None:
    loaded.add(new)
    try:
        loaded.load(new.entry)
    except BaseException:
        loaded.drop(new.entry.name)
        raise
    _LOG.info("added adapter %r from %s", new.entry.name, new.folder)
