"""Publishes an adapter alone: in the newest release of its bundle, whose other files the repository has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgetune_runtime.bundle import MANIFEST_NAME, AdapterEntry, read_manifest, sha256_of
from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError
from edgetune_runtime.formats.atomic import replacing
from edgetune_runtime.inference.bundle_files import add_to_bundle, remove_from_bundle
from edgetune_runtime.update.release import BLOBS_FOLDER, Release

from edgetune.common.files import link_or_copy, write_file

from .key_folder import KeyFolder
from .publish import locked, read_release
from .repository import Repository

_FOLDER = ".adapter"


@contextmanager
def with_adapter(
    source: Path, adapter: str, repo: Path, keys: KeyFolder, channel: str
) -> Iterator[tuple[Path, Release]]:
    """The bundle of the newest release with an adapter of the bundle `source`, which has its name; and that release.

    It is in a folder that the end of the block deletes, and the repository is locked in the block. A router stays as it
    is. NotFoundError without a release or an adapter of these names, IncompatibleError for an adapter of another base
    or without one of the formats, VerificationError if the repository has another manifest than the release; the errors
    of reading a bundle and a repository. The other files are still to be compared with the manifest.
    """
    bundle = repo / _FOLDER / "bundle"
    manifest = read_manifest(source)
    with locked(repo):
        release = newest_release(Repository(repo, keys), manifest.name, channel, "publish the whole bundle first")
        require_formats(release, manifest.adapter(adapter))
        shutil.rmtree(bundle.parent, ignore_errors=True)
        try:
            for path, entry in release.files.items():
                # What changes the bundle replaces files, and writes into none.
                link_or_copy(repo / BLOBS_FOLDER / entry.sha256, bundle / path)
            _own_manifest(bundle, release)
            _exchange(repo, bundle, source, adapter)
            yield bundle, release
        finally:
            shutil.rmtree(bundle.parent, ignore_errors=True)


def newest_release(repository: Repository, name: str, channel: str, remedy: str) -> Release:
    """The newest release of a bundle in a channel; NotFoundError with this remedy if there is none."""
    release = read_release(repository, name, channel)
    if release is None:
        raise NotFoundError(f"{repository.folder} has no release of {name!r} in the channel {channel!r}", remedy)
    return release


def require_formats(release: Release, entry: AdapterEntry) -> None:
    """IncompatibleError unless an adapter has files for all formats of a release."""
    lacking = [name for name in release.formats if name not in entry.files]
    if lacking:
        message = f"adapter {entry.name!r} has no file for {lacking[0]}, which release {release.version} has"
        raise IncompatibleError(message, f"build it for {' and '.join(release.formats)}")


def _own_manifest(bundle: Path, release: Release) -> None:
    """Replace the linked manifest by a copy, which nobody changes through the blob, and compare that."""
    path = bundle / MANIFEST_NAME
    with replacing(path) as temporary:
        shutil.copyfile(path, temporary)
        if sha256_of(temporary) != release.bundle:
            message = f"{BLOBS_FOLDER}/{release.bundle} is not the manifest of release {release.version}"
            raise VerificationError(message, "publish the whole bundle, which restores it")


def _exchange(repo: Path, bundle: Path, source: Path, adapter: str) -> None:
    """Put an adapter of `source` into the bundle, in place of one with its name."""
    before = read_manifest(bundle)
    if adapter in before.adapters:
        remove_from_bundle(bundle, adapter)
    add_to_bundle(bundle, source, adapter, lambda _: None)
    after, router = read_manifest(bundle), before.router
    if router is not None and after.router is None:
        # It was trained with the adapter's rows, and chooses it by its name.
        files = {**after.files, router.file: before.files[router.file]}
        link_or_copy(repo / BLOBS_FOLDER / files[router.file].sha256, bundle / router.file)
        write_file(bundle / MANIFEST_NAME, replace(after, router=router, files=files).to_json())
