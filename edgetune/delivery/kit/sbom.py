"""The bill of materials of a kit in CycloneDX: versions, digests and SPDX licences of its wheels and its base."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
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
# Licences in the metadata of wheels without License-Expression, as SPDX expressions.
_SPDX = {
    "MIT": "MIT",
    "MIT License": "MIT",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD-3-Clause": "BSD-3-Clause",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_BSD = ("BSD", "BSD License")


def bill_of_materials(bundle: Path, manifest: Manifest, version: str, wheels: Sequence[Wheel]) -> str:
    """The text of sbom.cdx.json; without a time, so that the same bundle and wheels give the same text."""
    components = [_base(bundle, manifest), *(_component(wheel) for wheel in wheels)]
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


def _base(bundle: Path, manifest: Manifest) -> Mapping[str, Any]:
    """The base model. Only the GGUF file of a base can state a licence."""
    base = manifest.base
    file = base.files.get(gguf.NAME)
    stated = None if file is None else read_header(resolve(bundle, file)).metadata.get("general.license")
    return {
        "type": "machine-learning-model",
        "bom-ref": f"base:{base.name}",
        "name": base.name,
        "version": base.fingerprint,
        "components": [
            {"type": "file", "name": path, "hashes": [{"alg": "SHA-256", "content": manifest.files[path].sha256}]}
            for path in base.files.values()
        ],
        "licenses": _licences(_spdx(str(stated)), str(stated)) if stated else _licences(None, "see the base's source"),
    }


def _spdx(licence: str) -> str | None:
    """The SPDX expression of a licence as a model states it; None if SPDX does not know it (such as `gemma`)."""
    try:
        return canonicalize_license_expression(licence)
    except InvalidLicenseExpression:
        return None


def _licences(expression: str | None, otherwise: str) -> list[Mapping[str, Any]]:
    """The field `licenses` of a component: an SPDX expression, or a text where there is none."""
    return [{"expression": expression} if expression else {"license": {"name": otherwise}}]


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
    """The SPDX expression of a wheel's licence, from its metadata; None if the metadata names no known licence."""
    expression: str | None = wheel.metadata["License-Expression"]
    if expression:
        return expression
    prefix = "License :: OSI Approved :: "
    licences = [
        text.removeprefix(prefix) for text in wheel.metadata.get_all("Classifier", []) if text.startswith(prefix)
    ]
    licences += [wheel.metadata["License"] or ""]
    expression = next((_SPDX[text] for text in licences if text in _SPDX), None)
    if expression is None and any(text in _BSD for text in licences):
        # The name does not tell the number of clauses.
        expression = "BSD-3-Clause" if "Neither the name" in wheel.text("LICENSE") else "BSD-2-Clause"
    return expression
