"""Parts of a bundle: an adapter that its author has signed, in place of the one that the bundle's owner has.

The manifest says with which keys which adapter may be replaced (`Manifest.authors`). A part is the file
`authors/ADAPTER/part.json`, with the adapter's entry and its files, all of them in that folder: it can name no other
file, and change nothing else. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, NotFoundError, VerificationError, parsing
from edgetune_runtime.type_checks import FINITE, dataclass_of
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, shortened

from .files import bundle_path, files_only_of, folders_of, resolve, sha256_of, with_present_formats
from .reading import check, parse_adapter, parse_manifest
from .records import AUTHOR_NAME, LONGEST_MANIFEST, MANIFEST_NAME, AdapterEntry, FileEntry, Manifest

SCHEMA_VERSION = 1
FOLDER = "authors"
LONGEST_PART = 1 << 20
_NAME = "part.json"
MOST_VERSION = 10**9
_PURPOSE = b"edgetune part\n"
"""Signed in front of a part, so that no signature for another purpose fits."""
_PATH = re.compile(rf"{FOLDER}/{AUTHOR_NAME}/{re.escape(_NAME)}")


@dataclass(frozen=True)
class Part:
    """An author's adapter in the bundle called `bundle`, for the base with the fingerprint that `adapter` names.

    `version` grows with each part that a key signs. `signed` are the bytes that `signatures` are of.
    """

    bundle: str
    version: int
    adapter: AdapterEntry
    files: Mapping[str, FileEntry]
    signed: bytes = field(default=b"", compare=False)
    signatures: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """What is signed, as JSON values."""
        values = {name: value for name, value in asdict(self).items() if name not in {"signed", "signatures"}}
        # As they are read: JSON has no numbers as keys.
        return dict(json.loads(json.dumps({"schema": SCHEMA_VERSION, **values})))


Verify = Callable[[Part, Mapping[str, Any]], None]
"""Raises VerificationError unless a part is signed by one of these keys, which the manifest has."""


def part_path(adapter: str) -> str:
    """The path of an adapter's part in a bundle."""
    return f"{FOLDER}/{adapter}/{_NAME}"


def signed_bytes(part: Mapping[str, Any]) -> bytes:
    """What the signatures of a part, given as JSON values, are of: the same bytes however its file is laid out."""
    return _PURPOSE + json.dumps(part, sort_keys=True).encode()


def parse_part(data: bytes, where: str) -> Part:
    """The part in a file; no signature is checked.

    VerificationError if it is damaged or names files outside its folder, IncompatibleError if it has a newer schema.
    """
    with parsing(f"{where} is damaged", COPY_BUNDLE_AGAIN):
        raw = FINITE.decode(data.decode())
        about = raw["part"]
        if about["schema"] != SCHEMA_VERSION:
            message = f"{where} has schema {shortened(str(about['schema']))}, this runtime reads {SCHEMA_VERSION}"
            raise IncompatibleError(message, "update edgetune-runtime")
        files = {name: dataclass_of(FileEntry, entry) for name, entry in about["files"].items()}
        values = {"bundle": about["bundle"], "version": about["version"], "adapter": parse_adapter(about["adapter"])}
        values |= {"files": files, "signed": signed_bytes(about), "signatures": raw["signatures"]}
        part = dataclass_of(Part, values)
        folder = part_path(part.adapter.name).removesuffix(_NAME)
        named = {*part.files, *part.adapter.files.values(), *part.adapter.shared_files}
        folders = folders_of(map(bundle_path, named))
        outside = [
            name for name in named
            if not name.startswith(folder) or name in folders or name.removeprefix(folder).split("/")[0] == _NAME
        ]  # fmt: skip
        if outside or named != part.files.keys():
            raise ValueError(f"it names {next(iter(outside or named - part.files.keys()))!r}, which is not its own")
        if not re.fullmatch(AUTHOR_NAME, part.adapter.name) or not 1 <= part.version <= MOST_VERSION:
            raise ValueError(f"it is version {part.version} of {part.adapter.name!r}")
    return part


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `bundle/manifest.json` and the parts of authors that it lets replace adapters; no other file.

    Raises NotFoundError when `bundle` is not a bundle, VerificationError when the manifest or a part is invalid, has
    another schema or names paths outside the bundle, and IncompatibleError when an adapter was trained on another base.
    """
    path = bundle / MANIFEST_NAME
    data = bytes_of(path, LONGEST_MANIFEST)
    if data is None:
        remedy = "give the folder that `edgetune build --out` wrote"
        raise NotFoundError(f"{bundle} is not a bundle: it has no {MANIFEST_NAME}", remedy)
    return with_files_of(bundle, parse_manifest(data, path))


def with_files_of(bundle: Path, manifest: Manifest, verify: Verify | None = None) -> Manifest:
    """The manifest of a bundle with the parts that are in its folder, and without formats that are not.

    Errors as those of `with_parts`.
    """
    composed = with_parts(manifest, lambda name: bytes_of(resolve(bundle, name), LONGEST_PART), verify)
    return with_present_formats(composed, lambda name: (bundle / name).exists())


def bytes_of(path: Path, most_bytes: int) -> bytes | None:
    """The contents of a file, None if there is none; VerificationError if it is no regular file, or too large."""
    if path.exists() and (not path.is_file() or path.stat().st_size > most_bytes):
        raise VerificationError(f"{path} is not a regular file of up to {most_bytes} bytes", COPY_BUNDLE_AGAIN)
    try:
        with path.open("rb") as file:
            return file.read(most_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise VerificationError(f"cannot read {path}: {error.strerror}", "check its permissions") from error


def with_parts(manifest: Manifest, read: Callable[[str], bytes | None], verify: Verify | None = None) -> Manifest:
    """The manifest with the parts that `read` gives by their paths in the bundle, None where there is none.

    VerificationError for a part that is damaged, of another bundle or adapter, or not signed by its author's keys;
    IncompatibleError for one that was made for another base.
    """
    composed = manifest
    for name, keys in manifest.authors.items():
        path = part_path(name)
        data = read(path)
        if data is None:
            continue
        part = parse_part(data, path)
        if verify is not None:
            verify(part, keys)
        composed = _with_part(composed, part, name)
    if composed is not manifest:
        check(composed, Path(FOLDER))
    return composed


def _with_part(manifest: Manifest, part: Part, name: str) -> Manifest:
    path = part_path(name)
    if (part.bundle, part.adapter.name) != (manifest.name, name):
        message = f"{path} is of the adapter {shortened(part.adapter.name)} of {shortened(part.bundle)}"
        raise VerificationError(message, "do not use this bundle")
    replaced = set() if name not in manifest.adapters else {*files_only_of(manifest, manifest.adapters[name])}
    files = {file: entry for file, entry in manifest.files.items() if file not in replaced}
    others = files.keys() & part.files.keys()
    if others:
        raise VerificationError(f"{path} names {min(others)}, which others use too", "do not use this bundle")
    return replace(manifest, adapters={**manifest.adapters, name: part.adapter}, files={**files, **part.files})


def parts_among(paths: Iterable[str]) -> list[str]:
    """Those of the paths in a bundle that are of parts."""
    return sorted(path for path in paths if _PATH.fullmatch(path))


def parts_in(bundle: Path) -> list[str]:
    """The paths of the parts that are in a bundle's folder."""
    return parts_among(
        path.relative_to(bundle).as_posix() for path in bundle.glob(f"{FOLDER}/*/{_NAME}") if path.is_file()
    )


def identity(digests: Mapping[str, str]) -> str:
    """What tells a bundle from others, from the digests of its files: that of its manifest, and those of its parts."""
    parts = parts_among(digests)
    if not parts:
        return digests[MANIFEST_NAME]
    text = "".join(f"{digests[path]} {path}\n" for path in (MANIFEST_NAME, *parts))
    return hashlib.sha256(text.encode()).hexdigest()


def identity_in(bundle: Path) -> str:
    """The `identity` of the bundle in a folder."""
    return identity({name: sha256_of(bundle / name) for name in (MANIFEST_NAME, *parts_in(bundle))})
