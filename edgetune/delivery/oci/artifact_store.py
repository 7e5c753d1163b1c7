"""The place for the artifact of a reference: an OCI registry or an image layout, which have the same methods."""

from __future__ import annotations

import hashlib

from edgetune_runtime.errors import VerificationError

from .artifact import DIGEST
from .layout import ImageLayout
from .registry import Registry

ArtifactStore = Registry | ImageLayout
"""Where an artifact is, or will be."""


def checked_manifest(store: ArtifactStore) -> bytes:
    """The artifact's manifest; VerificationError if it does not have the digest of the reference."""
    data = store.read_manifest()
    digest = hashlib.sha256(data).hexdigest()
    if store.reference.digest not in {None, digest}:
        raise VerificationError(f"{store.reference} was answered with the artifact {DIGEST}{digest}", "try again")
    return data
