"""The bill of materials of a kit in CycloneDX: versions, digests and licences of its wheels and its base."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import Manifest, resolve, sha256_of
from edgetune_runtime.engines import gguf
from edgetune_runtime.formats.gguf_file import read_header
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from .wheels import Wheel

NAME = "sbom.cdx.json"
_SPEC_VERSION = "1.6"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "edgetune")


def bill_of_materials(bundle: Path, manifest: Manifest, engine: str, version: str, wheels: Sequence[Wheel]) -> str:
    """The text of sbom.cdx.json; without a time, so that the same bundle and wheels give the same text."""
    components = [_base(bundle, manifest, engine), *(_component(wheel) for wheel in wheels)]
    name = manifest.name
    subject = {"type": "application", "bom-ref": name, "name": name, "version": version}
    raw = {
        "$schema": f"http://cyclonedx.org/schema/bom-{_SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, json.dumps([subject, components], sort_keys=True))}",
        "version": 1,
        "metadata": {"component": subject},
        "components": components,
    }
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"


def _base(bundle: Path, manifest: Manifest, engine: str) -> Mapping[str, Any]:
    """The base model in the format of an engine. Only the GGUF file of a base can state a licence."""
    base = manifest.base
    file = base.files.get(gguf.NAME)
    stated = None if file is None else read_header(resolve(bundle, file)).metadata.get("general.license")
    path = base.files[engine]
    digest = manifest.files[path].sha256
    return {
        "type": "machine-learning-model",
        "bom-ref": f"base:{base.name}",
        "name": base.name,
        "version": base.fingerprint,
        "components": [{"type": "file", "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]}],
        "licenses": _licences(str(stated) if stated else None, "see the base's source"),
    }


def _licences(stated: str | None, otherwise: str) -> list[Mapping[str, Any]]:
    """The field `licenses` of a component: an SPDX expression if the stated licence is one, or else a text."""
    if stated:
        with suppress(InvalidLicenseExpression):
            return [{"expression": canonicalize_license_expression(stated)}]
    return [{"license": {"name": stated or otherwise}}]


def _component(wheel: Wheel) -> Mapping[str, Any]:
    version = wheel.metadata["Version"]
    purl = f"pkg:pypi/{wheel.name}@{version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": wheel.name,
        "version": version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": sha256_of(wheel.path)}],
        "licenses": _licences(license_of(wheel), "see the wheel"),
    }


def license_of(wheel: Wheel) -> str | None:
    """The licence in a wheel's metadata, in its newest form; None if it has none in one line."""
    classifiers = [text for text in wheel.metadata.get_all("Classifier", []) if text.startswith("License :: ")]
    names = [text.rpartition(" :: ")[2] for text in classifiers]
    stated = [wheel.metadata["License-Expression"], wheel.metadata["License"], *names]
    return next((text for text in stated if text and "\n" not in text), None)
