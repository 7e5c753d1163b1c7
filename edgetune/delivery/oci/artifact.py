"""The manifest of a bundle's OCI artifact, with the media types of the CNCF's ModelPack: a layer for each file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from edgetune_runtime.bundle import MANIFEST_NAME, FileEntry, Manifest, entry_of
from edgetune_runtime.bundle.files import bundle_path, folders_of
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.update.release import file_entry

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MOST_ARTIFACT_MANIFEST_BYTES = 4 << 20
"""The size that registries must accept at least; larger manifests are refused."""
_MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
_LAYER_TYPES = {
    ".json": "application/vnd.cncf.model.weight.config.v1.raw",
    ".sig": "application/vnd.cncf.model.weight.config.v1.raw",
    ".jinja": "application/vnd.cncf.model.weight.config.v1.raw",
    ".md": "application/vnd.cncf.model.doc.v1.raw",
}
"""Media types of files by their suffix."""
_WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
_PATH, _TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
"""Annotations with a layer's path: of ModelPack, and of programs that push any files."""
DIGEST = "sha256:"
"""Before each digest."""
EMPTY_CONFIG = b"{}"
"""What artifacts other than images have in place of a description."""
_EMPTY_TYPE, _FILE_TYPE = "application/vnd.oci.empty.v1+json", "application/json"


def config_of(manifest: Manifest, files: Mapping[str, FileEntry]) -> bytes:
    """ModelPack's description of the model; the same for the same bundle."""
    base = manifest.base
    config = {
        "architecture": base.architecture,
        "format": ",".join(base.files),
        "paramSize": f"{base.parameters / 1e6:.0f}m",
        **({} if base.quantization is None else {"quantization": base.quantization}),
    }
    layers = {"type": "layers", "diffIds": [f"{DIGEST}{entry.sha256}" for entry in files.values()]}
    return _json({"descriptor": {"name": manifest.name}, "config": config, "modelfs": layers})


def artifact_manifest(files: Mapping[str, FileEntry], config: bytes) -> bytes:
    """The artifact's manifest; `files` are those of the bundle, its manifest included, by their paths."""
    layers = [
        {**descriptor(_layer_type(path), entry), "annotations": {_PATH: path, _TITLE: path}}
        for path, entry in files.items()
    ]
    return _json(_manifest(_MODEL_TYPE, descriptor(_CONFIG_TYPE, entry_of(config)), layers))


def referrer_manifest(
    subject: FileEntry, kind: str, files: Mapping[str, FileEntry], annotations: Mapping[str, str]
) -> bytes:
    """The manifest of an artifact of this kind that refers to another one, whose manifest is `subject`."""
    layers = [{**descriptor(_FILE_TYPE, entry), "annotations": {_TITLE: path}} for path, entry in files.items()]
    own = _manifest(kind, descriptor(_EMPTY_TYPE, entry_of(EMPTY_CONFIG)), layers)
    return _json({**own, "subject": descriptor(MANIFEST_TYPE, subject), "annotations": annotations})


def _manifest(kind: str, config: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": kind,
        "config": config,
        "layers": layers,
    }


def parse_artifact(data: bytes, where: str) -> dict[str, FileEntry]:
    """The files of a bundle's artifact by their paths in it; VerificationError unless it is one of a bundle."""
    files = layers_of(data, where)
    if MANIFEST_NAME not in files:
        raise _no_bundle(where, f"it has no {MANIFEST_NAME}")
    return files


def layers_of(data: bytes, where: str) -> dict[str, FileEntry]:
    """The files of an artifact by their paths; VerificationError for a damaged one, and for an invalid path."""
    try:
        raw = json.loads(data)
        if raw.get("mediaType", MANIFEST_TYPE) != MANIFEST_TYPE:
            raise ValueError(f"it is of the type {str(raw['mediaType'])[:80]!r}")
        files = dict(_file(layer) for layer in raw["layers"])
        if folders_of(files) & files.keys():
            raise ValueError("it has a file in place of a folder")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _no_bundle(where, str(error)[:200]) from error
    return files


def _no_bundle(where: str, reason: str) -> VerificationError:
    remedy = "check the reference; `edgetune push` makes such artifacts"
    return VerificationError(f"{where} is not a bundle: {reason}", remedy)


def _file(layer: Mapping[str, Any]) -> tuple[str, FileEntry]:
    named = layer.get("annotations") or {}
    path = named.get(_PATH) or named.get(_TITLE)
    if path is None:
        raise ValueError("it has a layer without a file's name")
    return bundle_path(path), described_entry(layer)


def descriptor(media_type: str, entry: FileEntry) -> dict[str, Any]:
    """What names a file of an artifact, or a manifest, by its digest."""
    return {"mediaType": media_type, "digest": f"{DIGEST}{entry.sha256}", "size": entry.bytes}


def described_entry(described: Mapping[str, Any]) -> FileEntry:
    """The digest and size in a descriptor; ValueError, TypeError, LookupError or AttributeError for a wrong one."""
    return file_entry({"sha256": described["digest"].removeprefix(DIGEST), "bytes": described["size"]})


def index_of(others: Sequence[Mapping[str, Any]], added: Mapping[str, Any]) -> dict[str, Any]:
    """The index of these descriptors."""
    return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [*others, added]}


def _layer_type(path: str) -> str:
    return _LAYER_TYPES.get(PurePosixPath(path).suffix, _WEIGHT_TYPE)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
