"""Downloads what a version lacks, by digest: the manifest first where the device wants some formats only.

Of a large text, such as the manifest, only the pieces are downloaded that the current version's file does not have.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune_runtime.bundle import LONGEST_MANIFEST, MANIFEST_NAME, of_formats, parse_manifest
from edgetune_runtime.bundle.parts import parts_among, with_parts
from edgetune_runtime.bundle.signatures import require_author, unlisted
from edgetune_runtime.errors import IncompatibleError, OutOfSpaceError, VerificationError
from edgetune_runtime.store import versions
from edgetune_runtime.store.durable import changing
from edgetune_runtime.store.files import Store
from edgetune_runtime.store.kit import Kit
from edgetune_runtime.store.versions import Say

from .fetch import Location
from .pieces import assembled, known_pieces
from .release import BLOBS_FOLDER, Release

_RESERVE_BYTES = 50 * 10**6
"""Left free on the disk for everything else on the device."""


@dataclass(frozen=True)
class Blobs:
    """The files of a release in a repository; `bundle` is the current one of the device, None if there is none."""

    release: Release
    location: Location
    bundle: Path | None

    def receive(self, store: Store, sha256: str, size: int) -> None:
        """Receive a file, and go on where a connection was lost."""
        path, release = f"{BLOBS_FOLDER}/{sha256}", self.release
        name = next((name for name in release.pieces if release.files[name].sha256 == sha256), None)
        pieces, known = release.pieces.get(name or "", ()), known_pieces(self._older(name))

        def rest_from(offset: int) -> Iterator[bytes]:
            if pieces:
                return assembled(self.location, path, pieces, known, offset)
            return self.location.blocks(path, size - offset, offset)

        store.receive(sha256, size, rest_from, "update again, it goes on from there")

    def _older(self, name: str | None) -> list[bytes]:
        """The file of this name in the current bundle, if it is there."""
        path = None if self.bundle is None or name is None else self.bundle / name
        return [path.read_bytes()] if path and path.is_file() and path.stat().st_size <= LONGEST_MANIFEST else []


def of_wanted_formats(prefix: Path, blobs: Blobs, formats: tuple[str, ...], quota_mb: float, say: Say) -> Release:
    """The release with the files of these formats, which its manifest names; that is downloaded for it.

    IncompatibleError if the release lacks one of the formats, OutOfSpaceError as `download`.
    """
    release = blobs.release
    require_formats(release, formats)
    store, texts = Store(prefix), dict[str, bytes]()
    parts = parts_among(release.files)
    if {*formats} == {*release.formats} and not parts:
        return release
    for name in (MANIFEST_NAME, *parts):
        entry = release.files[name]
        if store.bytes_of(entry.sha256, entry.bytes) != entry.bytes:
            _make_room(prefix, release, entry.bytes, quota_mb, say)
            blobs.receive(store, entry.sha256, entry.bytes)
        texts[name] = store.path(entry.sha256).read_bytes()
    manifest = parse_manifest(texts[MANIFEST_NAME], store.path(release.files[MANIFEST_NAME].sha256))
    names = {*of_formats(with_parts(manifest, texts.get, require_author), formats).files, *unlisted(release.files)}
    files = {name: file for name, file in release.files.items() if name in names}
    return replace(release, files=files, formats=formats)


def require_formats(release: Release, formats: Sequence[str]) -> None:
    """IncompatibleError if the release lacks one of the formats."""
    lacking = [name for name in formats if name not in release.formats]
    if lacking:
        message = f"release {release.version} of {release.name} has no files for {lacking[0]}"
        raise IncompatibleError(message, f"use --formats {','.join(release.formats)}, or deploy a kit for one of these")


def download(prefix: Path, kit: Kit, blobs: Blobs, quota_mb: float, say: Say) -> None:
    """Receive the files of a version that the store lacks, and compare their digests.

    OutOfSpaceError, before any is received, without room on the disk or in the quota of the store, if that is not 0.
    """
    store = Store(prefix)
    sizes = {file.sha256: file.bytes for file in kit.version_files}
    received = store.received(sizes)
    missing = {sha256: size for sha256, size in sizes.items() if received.get(sha256) != size}
    for file in kit.version_files:
        if file.sha256 in missing and file not in kit.bundle_files:
            message = f"{file.name} in {prefix} is damaged, and no update has it"
            raise VerificationError(message, "install the kit again")
    needed = sum(size - received.get(sha256, 0) for sha256, size in missing.items())
    _make_room(prefix, blobs.release, needed, quota_mb, say)
    if missing:
        say(f"downloading {needed / 1e6:.1f} MB")
    for sha256, size in missing.items():
        blobs.receive(store, sha256, size)


def _make_room(prefix: Path, release: Release, needed: int, quota_mb: float, say: Say) -> None:
    """OutOfSpaceError without room, also after deleting what releases have left that failed or came in part."""
    store = Store(prefix)
    try:
        _require_room(store, needed, quota_mb)
    except OutOfSpaceError:
        with changing(prefix):
            versions.sweep(prefix, say, [file.sha256 for file in release.files.values()])
        _require_room(store, needed, quota_mb)


def _require_room(store: Store, needed: int, quota_mb: float) -> None:
    free, total_mb = shutil.disk_usage(store.folder.parent).free, (store.total_bytes + needed) / 1e6
    if free < needed + _RESERVE_BYTES:
        message = f"the update needs {(needed + _RESERVE_BYTES) / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free"
        raise OutOfSpaceError(message, "free some space")
    if quota_mb and total_mb > quota_mb:
        message = f"with the update, the versions here would have {total_mb:.3f} MB, and {quota_mb:.3f} MB are allowed"
        raise OutOfSpaceError(message, "allow more with --quota-mb")
