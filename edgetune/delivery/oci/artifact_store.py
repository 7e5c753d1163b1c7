"""What an OCI registry and an image layout have in common: a place for the artifact of a reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

from edgetune_runtime.bundle import FileEntry
from edgetune_runtime.errors import VerificationError

from .artifact import MANIFEST_TYPE
from .reference import Reference


class ArtifactStore(Protocol):
    """Where an artifact is, or will be."""

    reference: Reference

    def at(self, reference: Reference) -> Self:
        """The place of another artifact beside this one."""

    def has_blob(self, entry: FileEntry) -> bool:
        """Whether it has this file."""

    def put_blob(self, entry: FileEntry, source: Path | bytes) -> None:
        """Add a file."""

    def blocks(self, entry: FileEntry, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a file from an offset on, at most its size."""

    def read_manifest(self) -> bytes:
        """The artifact's manifest."""

    def put_manifest(self, data: bytes, media_type: str = MANIFEST_TYPE) -> bool:
        """Add the artifact's manifest under its tag or digest; whether it is listed as a referrer of its subject."""

    def read_referrers(self) -> list[bytes]:
        """The index of what refers to the artifact, which has a digest, in one or more parts; NotFoundError if none."""


def checked_manifest(store: ArtifactStore) -> bytes:
    """The artifact's manifest; VerificationError if it does not have the digest of the reference."""
    data = store.read_manifest()
    digest = hashlib.sha256(data).hexdigest()
    if store.reference.digest not in {None, digest}:
        raise VerificationError(f"{store.reference} was answered with the artifact sha256:{digest}", "try again")
    return data
