"""TUF's metadata of a bundle's release, as a referrer of its OCI artifact: a pull can then check what a device checks.

The referrer has the files of a signed repository that a device reads before it downloads a bundle, a layer each.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import FileEntry, entry_of
from edgetune_runtime.errors import NotFoundError, VerificationError
from edgetune_runtime.store.files import Store
from edgetune_runtime.update.fetch import Location
from edgetune_runtime.update.release import (
    LONGEST_RELEASE,
    METADATA_FOLDER,
    Release,
    newest_parts,
    with_parts,
)
from edgetune_runtime.update.trust import TrustedRepository

from .artifact import (
    EMPTY_CONFIG,
    INDEX_TYPE,
    MANIFEST_TYPE,
    described_entry,
    descriptor,
    index_of,
    layers_of,
    referrer_manifest,
)
from .artifact_store import ArtifactStore, checked_manifest

METADATA_TYPE = "application/vnd.edgetune.release.tuf.v1"
"""The artifact type of the referrer."""
_CREATED = "org.opencontainers.image.created"
_ROOT = ".root.json"
_MOST_BYTES = 4 * LONGEST_RELEASE
_UNKNOWN_TIME = datetime.fromtimestamp(0, UTC)
_PUSH_AGAIN = "push the bundle again with --repo"


@dataclass(frozen=True)
class TrustedChannel:
    """The root whose keys lead to a release, a N.root.json, and the channel that it is in."""

    root: bytes
    channel: str


class _ReadFiles(Location):
    """A repository that keeps what was read of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.files: dict[str, bytes] = {}

    def blocks(self, path: str, most: int, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a file."""
        data = b"".join(super().blocks(path, most, offset))
        self.files[path] = data
        yield data


def read_metadata(repo: Path, channel: str, name: str, files: Mapping[str, FileEntry]) -> dict[str, bytes]:
    """The files of a repository that a device reads for the newest release of the bundle `name`, by their paths.

    VerificationError unless that release has these files of the bundle; the errors of reading a repository.
    """
    read = _ReadFiles(repo)
    roots = [path for path in (repo / METADATA_FOLDER).glob(f"*{_ROOT}") if path.name.removesuffix(_ROOT).isdecimal()]
    if not roots:
        raise NotFoundError(f"{repo} has no {METADATA_FOLDER}", "give the folder of `edgetune publish`")
    first = min(roots, key=lambda path: int(path.name.removesuffix(_ROOT)))
    with tempfile.TemporaryDirectory() as folder:
        trusted = TrustedChannel(first.read_bytes(), channel)
        _require_same(_newest(read, Path(folder), trusted, name), files, "publish it, and push again")
    return read.files


def attach(store: ArtifactStore, subject: FileEntry, metadata: Mapping[str, bytes]) -> None:
    """Add what `read_metadata` has read as a referrer of the artifact in the store, whose manifest is `subject`.

    A registry that lists referrers itself keeps those from before too; elsewhere it takes their place.
    """
    entries = {path: entry_of(data) for path, data in metadata.items()}
    blobs = {entry: metadata[path] for path, entry in entries.items()} | {entry_of(EMPTY_CONFIG): EMPTY_CONFIG}
    for entry, data in blobs.items():
        if not store.has_blob(entry):
            store.put_blob(entry, data)
    created = {_CREATED: datetime.now(UTC).isoformat(timespec="microseconds")}
    manifest = referrer_manifest(subject, METADATA_TYPE, entries, created)
    entry = entry_of(manifest)
    if not store.at(store.reference.by_digest(entry.sha256)).put_manifest(manifest):
        described = {"artifactType": METADATA_TYPE, "annotations": created}
        _list(store, {**descriptor(MANIFEST_TYPE, entry), **described})


def check(store: ArtifactStore, work: Path, trusted: TrustedChannel, name: str, files: Mapping[str, FileEntry]) -> None:
    """Compare the files of an artifact with its release, whose metadata is read into the folder `work`.

    VerificationError unless the newest release of the bundle `name`, as the referrer has it, has these files, and the
    keys of the root have signed it for now. NotFoundError if the artifact has no such referrer.
    """
    listed = [item for item in _listed(store) if _is_metadata(item)]
    if not listed:
        raise NotFoundError(f"{store.reference} has no metadata of a release", _PUSH_AGAIN)
    newest = max(listed, key=lambda item: str(item.get("annotations", {}).get(_CREATED, "")))
    data = checked_manifest(store.at(store.reference.by_digest(described_entry(newest).sha256)))
    layers, where = layers_of(data, str(store.reference)), work / "repository"
    if sum(entry.bytes for entry in layers.values()) > _MOST_BYTES:
        raise VerificationError(f"the metadata of {store.reference} has more than {_MOST_BYTES} bytes", _PUSH_AGAIN)
    # What an earlier call has left may be of another repository.
    shutil.rmtree(work, ignore_errors=True)
    received = Store(work)
    for path, entry in layers.items():
        if not received.path(entry.sha256).exists():
            received.receive(entry.sha256, entry.bytes, partial(store.blocks, entry), "run the command again")
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(received.path(entry.sha256), where / path)
    _require_same(_newest(Location(str(where)), work / "trusted", trusted, name), files, _PUSH_AGAIN)


def _newest(location: Location, folder: Path, trusted: TrustedChannel, name: str) -> Release:
    """The newest release of a bundle, with its parts, that the keys of the root have signed for now."""
    repository = TrustedRepository(location, folder, trusted.root, _UNKNOWN_TIME)
    repository.refresh()
    release = repository.release(name, trusted.channel)
    return with_parts(release, newest_parts(release, repository.parts(name, trusted.channel)))


def _require_same(release: Release, files: Mapping[str, FileEntry], remedy: str) -> None:
    wrong = sorted(path for path, entry in files.items() if release.files.get(path) != entry)
    if wrong:
        title = f"release {release.version} of {release.name} in {release.channel}"
        raise VerificationError(f"{title} has another {wrong[0]}", remedy)


def _list(store: ArtifactStore, described: Mapping[str, Any]) -> None:
    """List a referrer under the tag that takes the place of the list where a registry keeps none."""
    others = [item for item in _listed(store) if not _is_metadata(item)]
    index = json.dumps(index_of(others, described), indent=1).encode()
    store.at(store.reference.of_referrers()).put_manifest(index, INDEX_TYPE)


def _listed(store: ArtifactStore) -> list[dict[str, Any]]:
    """What refers to an artifact, as descriptors; those of a release's metadata are checked."""
    try:
        parts = store.read_referrers()
    except NotFoundError:
        return []
    try:
        listed = [item for part in parts for item in json.loads(part)["manifests"]]
        for item in filter(_is_metadata, listed):
            described_entry(item)
            if not isinstance(item.get("annotations", {}), dict):
                raise TypeError("its annotations are not an object")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        message = f"the list of what refers to {store.reference} is damaged"
        raise VerificationError(message, _PUSH_AGAIN) from error
    return listed


def _is_metadata(described: Mapping[str, Any]) -> bool:
    return described.get("artifactType") == METADATA_TYPE
