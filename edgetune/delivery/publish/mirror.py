"""Fetches a bundle from an OCI registry or layout to publish it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.update.release import BLOBS_FOLDER

from edgetune.common.progress import Progress
from edgetune.delivery.oci.artifact_store import ArtifactStore
from edgetune.delivery.oci.transfer import naming, pull

from .key_folder import KeyFolder
from .publish import locked

_FOLDER = ".from"


@contextmanager
def fetched(
    store: ArtifactStore, repo: Path, keys: KeyFolder, progress: Progress, trusted_keys: Path | None
) -> Iterator[Path]:
    """The bundle of an artifact, in a folder that the end of the block deletes; errors as those of `pull`.

    The repository is locked in the block.

    What the repository will sign must be what somebody meant: a tag is what the registry says, so its bundle must be
    signed by a key in `trusted_keys` (default: those of `keys`). A digest needs no signature. What an interrupted call
    has fetched, and the files of the repository, are not fetched again.
    """
    bundle = repo / _FOLDER / "bundle"
    # What was checked must be what is published.
    with locked(repo):
        pull(store, bundle, progress, trusted_keys=trusted_keys, blobs=repo / BLOBS_FOLDER)
        try:
            if trusted_keys is None and store.reference.digest is None:
                with naming(store.reference, bundle):
                    read_signed_manifest(bundle, keys.trusted_keys(keys.role_of(read_manifest(bundle).name)))
            yield bundle
        finally:
            shutil.rmtree(bundle.parent)
