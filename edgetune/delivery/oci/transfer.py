"""Sends a bundle to an OCI registry or an image layout, and fetches one from there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import (
    LONGEST_MANIFEST,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    entry_of,
    read_manifest,
    resolve,
    verify_files,
    with_present_formats,
)
from edgetune_runtime.bundle.lock import locked
from edgetune_runtime.bundle.parts import LONGEST_PART
from edgetune_runtime.bundle.records import MOST_AUTHORS
from edgetune_runtime.bundle.signatures import (
    LONGEST_SIGNATURE,
    SIGNATURE_NAME,
    read_signed_manifest,
    unlisted,
    unlisted_in,
)
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.formats.atomic import require_space, swap_in
from edgetune_runtime.store.durable import flush_tree
from edgetune_runtime.store.files import Store
from edgetune_runtime.update.http_client import HttpClient
from edgetune_runtime.update.state import DEFAULT_CHANNEL

from edgetune.common import work_folder
from edgetune.common.files import link_or_copy
from edgetune.common.progress import Progress

from . import release_metadata
from .artifact import artifact_manifest, config_of, parse_artifact
from .artifact_store import ArtifactStore, checked_manifest
from .layout import ImageLayout
from .login import credentials_for
from .reference import Reference, parse_reference
from .registry import Registry
from .release_metadata import TrustedChannel

_GOES_ON = "run the command again, it goes on from there"


@dataclass(frozen=True)
class Pushed:
    """An artifact by its digest, the bytes of its files, and how many of them were sent."""

    reference: Reference
    bytes: int
    sent_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {"reference": str(self.reference), "bytes": self.bytes, "sent_bytes": self.sent_bytes}


@contextmanager
def open_store(text: str, username: str | None, *, insecure: bool) -> Iterator[ArtifactStore]:
    """The registry or layout of a reference, in the block; errors as of `parse_reference` and `credentials_for`."""
    reference = parse_reference(text)
    if reference.is_layout:
        yield ImageLayout(reference)
        return
    credentials = credentials_for(reference.host, username)
    with closing(HttpClient("edgetune")) as http:
        yield Registry(reference, credentials, http, insecure=insecure)


def push(
    bundle: Path, store: ArtifactStore, progress: Progress, *, repo: Path | None = None, channel: str = DEFAULT_CHANNEL
) -> Pushed:
    """Send the files of a bundle that the store lacks, and then its manifest, which makes it the one of the tag.

    With `repo`, the metadata of its release in that repository refers to it before it gets the tag. Raises the errors
    of reading a bundle, of the repository and of the store; UsageError for a reference without a tag, VerificationError
    for a bundle that is not the newest release of the channel, before anything is sent.
    """
    if store.reference.tag is None:
        raise UsageError(f"{store.reference} has no tag", "push to a tag: NAME:TAG")
    manifest = read_manifest(bundle)
    progress.say(f"checking the files of {manifest.name}")
    verify_files(bundle, manifest)
    others = unlisted_in(bundle)
    sources = {name: resolve(bundle, name) for name in (*manifest.files, *others)}
    files = {**manifest.files, **{name: entry_of(sources[name]) for name in others}}
    metadata = None if repo is None else release_metadata.read_metadata(repo, channel, manifest.name, files)
    config = config_of(manifest, files)
    blobs: dict[FileEntry, Path | bytes] = {entry: sources[name] for name, entry in files.items()}
    blobs[entry_of(config)] = config
    lacking = [entry for entry in blobs if not store.has_blob(entry)]
    sent_bytes = sum(entry.bytes for entry in lacking)
    with progress.step(f"sending {sent_bytes / 1e6:.1f} MB", len(lacking)) as step:
        for entry in lacking:
            store.put_blob(entry, blobs[entry])
            step.update()
    data = artifact_manifest(files, config)
    described = entry_of(data)
    reference = store.reference.by_digest(described.sha256)
    if metadata is not None:
        pinned = store.at(reference)
        pinned.put_manifest(data)
        release_metadata.attach(pinned, described, metadata)
    store.put_manifest(data)
    return Pushed(reference, sum(entry.bytes for entry in blobs), sent_bytes)


def pull(
    store: ArtifactStore,
    out: Path,
    progress: Progress,
    *,
    trusted_keys: Path | None = None,
    trusted_channel: TrustedChannel | None = None,
    blobs: Path | None = None,
) -> Reference:
    """Fetch a bundle into the folder `out`, which may have a version of it; the artifact by its digest.

    Files of `out` and of `blobs`, a folder of files by their digests, are not fetched again, and neither is what an
    interrupted call has fetched. `out` changes when everything was verified. Raises the errors of the store;
    UsageError if `out` has other files; VerificationError if bytes do not have their digest, if the artifact is not
    a bundle, if it is not signed by a key in `trusted_keys`, or if it is not the newest release of `trusted_channel` by
    the metadata that refers to it; OutOfSpaceError without room; BusyError if another process changes `out`.
    """
    check_destination(out)
    data = checked_manifest(store)
    digest = hashlib.sha256(data).hexdigest()
    files = parse_artifact(data, str(store.reference))
    work = out.absolute().with_name(f".{out.name}.pull")
    with work_folder.locked(work):
        folder, received = work / "bundle", Store(work)
        received.folder.mkdir(exist_ok=True)
        _reuse(received, files, [*([] if blobs is None else [blobs]), out])
        shutil.rmtree(folder, ignore_errors=True)
        manifest = _fetch_manifest(store, files, received, folder, trusted_keys)
        if trusted_channel is not None:
            pinned = store.at(store.reference.by_digest(digest))
            release_metadata.check(pinned, work / "metadata", trusted_channel, manifest.name, files)
        by_digest = {entry.sha256: entry for entry in manifest.files.values()}
        count = received.received({sha256: entry.bytes for sha256, entry in by_digest.items()})
        lacking = [entry for entry in by_digest.values() if count.get(entry.sha256) != entry.bytes]
        lacking_bytes = sum(entry.bytes - count.get(entry.sha256, 0) for entry in lacking)
        require_space(work, lacking_bytes)
        with progress.step(f"fetching {lacking_bytes / 1e6:.1f} MB", len(lacking)) as step:
            for entry in lacking:
                received.receive(entry.sha256, entry.bytes, partial(store.blocks, entry), _GOES_ON)
                step.update()
        _place(received, manifest.files, folder)
        flush_tree(folder)
        with locked(out):
            swap_in(folder, out)
        work_folder.clear(work)
    return store.reference.by_digest(digest)


def _reuse(received: Store, files: Mapping[str, FileEntry], folders: Iterable[Path]) -> None:
    """Link files that are there, by their digests or by their paths in a bundle; damaged ones are found later."""
    for name, entry in files.items():
        for folder in folders:
            for path in (folder / entry.sha256, folder / name):
                is_known = received.path(entry.sha256).exists() or path.is_symlink() or not path.is_file()
                if not is_known and path.stat().st_size == entry.bytes:
                    link_or_copy(path, received.path(entry.sha256))


def _fetch_manifest(
    store: ArtifactStore, files: Mapping[str, FileEntry], received: Store, folder: Path, trusted_keys: Path | None
) -> Manifest:
    """Fetch manifest, signature and parts into `folder`; VerificationError unless `files` has the bundle's files."""
    others = {name: files[name] for name in unlisted(files)}
    most = {MANIFEST_NAME: LONGEST_MANIFEST, SIGNATURE_NAME: LONGEST_SIGNATURE}
    too_large = [name for name, entry in others.items() if entry.bytes > most.get(name, LONGEST_PART)]
    if too_large:
        message = f"{too_large[0]} of {store.reference} has {others[too_large[0]].bytes} bytes"
        raise VerificationError(message, "push the bundle again")
    if len(others) > len(most) + MOST_AUTHORS:
        raise VerificationError(f"{store.reference} has {len(others)} parts", "push the bundle again")
    for entry in others.values():
        if received.bytes_of(entry.sha256, entry.bytes) != entry.bytes:
            received.receive(entry.sha256, entry.bytes, partial(store.blocks, entry), _GOES_ON)
    _place(received, others, folder)
    with naming(store.reference, folder):
        manifest = with_present_formats(read_signed_manifest(folder, trusted_keys), files.__contains__)
    wrong = [name for name, entry in manifest.files.items() if files.get(name) != entry]
    if wrong:
        message = f"{store.reference} does not have {wrong[0]} as its bundle's manifest describes it"
        raise VerificationError(message, "push the bundle again")
    return manifest


@contextmanager
def naming(reference: Reference, folder: Path) -> Iterator[None]:
    """An error about a bundle names what it was fetched from in place of its temporary folder."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(error.message.replace(str(folder), str(reference)), error.remedy) from error


def _place(received: Store, files: Mapping[str, FileEntry], folder: Path) -> None:
    """Give received files their paths in a bundle."""
    for name, entry in files.items():
        link_or_copy(received.path(entry.sha256), folder / name)
