"""Signatures of bundles: a file beside the manifest, checked against the keys that a device trusts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import NotFoundError, VerificationError, importing, parsing

from . import LONGEST_MANIFEST, MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from .parts import Part, bytes_of, part_path, parts_among, parts_in, signed_bytes, with_files_of

if TYPE_CHECKING:
    from securesystemslib.signer import Key, Signature, Signer

SIGNATURE_NAME = f"{MANIFEST_NAME}.sig"
"""The signatures of a bundle's manifest, which has the digests of all its other files."""
_PURPOSE = b"edgetune manifest\n"
"""Signed in front of a manifest, so that no signature for another purpose fits."""
LONGEST_SIGNATURE = 1 << 16
_UNSIGNED = "use a bundle that is signed: edgetune publish, or edgetune keys sign"


def trusted_keys_text(keys: Iterable[Key]) -> str:
    """The text of a file of trusted keys: a bundle must be signed by one of them."""
    return json.dumps({"keys": {key.keyid: key.to_dict() for key in keys}}, indent=1) + "\n"


def read_trusted_keys(path: Path, least: int = 1) -> Mapping[str, Key]:
    """The keys in a file by their ids.

    NotFoundError if it cannot be read, VerificationError if it is not such a file, or has fewer than `least` keys.
    """
    with importing("signatures need", '"edgetune-runtime[update]"'):
        from securesystemslib.signer import Key  # noqa: PLC0415 - part of an extra

    try:
        with parsing(f"{path} is not a file of trusted keys", "copy it again"):
            raw = json.loads(_read(path))["keys"]
            keys = {str(keyid): Key.from_dict(keyid, value) for keyid, value in raw.items()}
    except OSError as error:
        remedy = "give the trusted-keys.json of `edgetune keys init`"
        raise NotFoundError(f"cannot read the trusted keys {path}: {error.strerror}", remedy) from error
    if len(keys) < least:
        raise VerificationError(f"{path} has no keys", "copy it again")
    return keys


def signature_file(manifest: bytes, signers: Iterable[Signer]) -> bytes:
    """The contents of SIGNATURE_NAME for a manifest."""
    return (json.dumps(_signatures(_PURPOSE + manifest, signers), indent=1) + "\n").encode()


def is_signature_file(data: bytes, manifest: bytes, keys: Iterable[Key]) -> bool:
    """Whether these contents of SIGNATURE_NAME are valid for a manifest, and of exactly these keys."""
    try:
        with parsing(SIGNATURE_NAME, ""):
            signatures = _parsed(json.loads(data)["signatures"])
    except VerificationError:
        return False
    by_id = {key.keyid: key for key in keys}
    signed = (_is_signed(_PURPOSE + manifest, signatures, {keyid: key}) for keyid, key in by_id.items())
    return signatures.keys() == by_id.keys() and all(signed)


def part_file(part: Part, signers: Iterable[Signer]) -> bytes:
    """The contents of the file of a part."""
    about = part.to_json()
    values = {"part": about, **_signatures(signed_bytes(about), signers)}
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _signatures(data: bytes, signers: Iterable[Signer]) -> dict[str, Any]:
    signatures = [signer.sign(data) for signer in signers]
    return {"signatures": [{"keyid": signature.keyid, "sig": signature.signature} for signature in signatures]}


def unlisted(names: Iterable[str]) -> list[str]:
    """Those of the paths in a bundle that no manifest lists: it, its signature, and the parts of authors."""
    paths = {*names}
    return [*(name for name in (MANIFEST_NAME, SIGNATURE_NAME) if name in paths), *parts_among(paths)]


def unlisted_in(bundle: Path) -> list[str]:
    """The files of a bundle's folder that are `unlisted`."""
    return [*(name for name in (MANIFEST_NAME, SIGNATURE_NAME) if (bundle / name).is_file()), *parts_in(bundle)]


def read_signed_manifest(bundle: Path, trusted: str | Path | None) -> Manifest:
    """The manifest of a bundle, which must be signed by a key in the file `trusted`, if that is not None.

    Its parts must be signed by keys in the manifest then. Raises what `require_signed` and `read_manifest` raise.
    """
    if trusted is None:
        return read_manifest(bundle)
    # What was checked is parsed, and not what another process may have put in its place.
    manifest = parse_manifest(require_signed(bundle, Path(trusted)), bundle / MANIFEST_NAME)
    return with_files_of(bundle, manifest, require_author)


def require_signed(bundle: Path, trusted: Path) -> bytes:
    """The manifest of a bundle; VerificationError unless it is signed by a key in the file `trusted`.

    Reads no other file of the bundle. NotFoundError if the folder has no manifest, or the keys cannot be read.
    """
    keys = read_trusted_keys(trusted)
    manifest = bytes_of(bundle / MANIFEST_NAME, LONGEST_MANIFEST)
    if manifest is None:
        raise NotFoundError(f"{bundle} is not a bundle: it has no {MANIFEST_NAME}", "give a bundle's folder")
    data = bytes_of(bundle / SIGNATURE_NAME, LONGEST_SIGNATURE)
    if data is None:
        raise VerificationError(f"{bundle} is not signed: it has no {SIGNATURE_NAME}", _UNSIGNED)
    with parsing(f"{bundle / SIGNATURE_NAME} is damaged", "copy the bundle again"):
        signatures = _parsed(json.loads(data)["signatures"])
    if not _is_signed(_PURPOSE + manifest, signatures, keys):
        message = f"{bundle} is not signed by a key in {trusted}, or its manifest was changed"
        raise VerificationError(message, "do not use this bundle")
    return manifest


def require_author(part: Part, keys: Mapping[str, Any]) -> None:
    """VerificationError unless a part is signed by one of these keys, which the manifest has as JSON values."""
    path = part_path(part.adapter.name)
    with parsing(f"{path} or the keys of its author are damaged", "copy the bundle again"):
        from securesystemslib.signer import Key  # noqa: PLC0415 - as above

        authors = {keyid: Key.from_dict(keyid, dict(value)) for keyid, value in keys.items()}
        signatures = _parsed(part.signatures)
    if not _is_signed(part.signed, signatures, authors):
        message = f"{path} is not signed by its author's key, or was changed"
        raise VerificationError(message, "do not use this bundle")


def _parsed(raw: Iterable[Any]) -> Mapping[str, Signature]:
    """Signatures by the ids of their keys."""
    from securesystemslib.signer import Signature  # noqa: PLC0415 - as above

    return {signature.keyid: signature for signature in (Signature.from_dict(dict(value)) for value in raw)}


def _is_signed(data: bytes, signatures: Mapping[str, Signature], keys: Mapping[str, Key]) -> bool:
    from securesystemslib.exceptions import Error as SigningError  # noqa: PLC0415 - as above

    for keyid in signatures.keys() & keys.keys():
        try:
            keys[keyid].verify_signature(signatures[keyid], data)
        except SigningError:
            continue
        return True
    return False


def _read(path: Path) -> bytes:
    """The bytes of a file or pipe; ValueError if there are more than LONGEST_SIGNATURE."""
    with path.open("rb") as file:
        data = file.read(LONGEST_SIGNATURE + 1)
    if len(data) > LONGEST_SIGNATURE:
        raise ValueError(f"{path.name} has more than {LONGEST_SIGNATURE} bytes")
    return data
