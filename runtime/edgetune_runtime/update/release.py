"""A release: the files of one version of a bundle in a repository. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune_runtime.bundle import LONGEST_MANIFEST, MANIFEST_NAME, FileEntry, entry_of
from edgetune_runtime.bundle.files import bundle_path, folders_of
from edgetune_runtime.bundle.parts import LONGEST_PART, MOST_VERSION, Part, identity, parse_part, part_path
from edgetune_runtime.bundle.records import AUTHOR_NAME, MOST_AUTHORS
from edgetune_runtime.errors import IncompatibleError, VerificationError, parsing
from edgetune_runtime.type_checks import DIGEST, MOST_BYTES, WORD, matching, whole
from edgetune_runtime.wording import shortened

from .pieces import Piece, parse_pieces

SCHEMA_VERSION = 1
ROLE_PREFIX = "bundle-"
"""Prefix of the role that signs a bundle's releases; the bundle's name follows."""
METADATA_FOLDER, TARGETS_FOLDER, BLOBS_FOLDER = "metadata", "targets", "blobs"
"""Folders of a repository: TUF's metadata, the releases, and the files of bundles by digest."""
LONGEST_RELEASE = 4 * 10**6
MOST_OLDER = 8
"""Older releases that are kept for devices that a newer one is not for."""
ISSUED = "issued"
"""Field of TUF's root and timestamp with the time of their signature: no clock may be before it."""
ROOT_VERSION = "root_version"
"""Field of TUF's timestamp with the version of the newest root: who has both need not ask for a newer one."""
PIECES = "pieces"
"""Field of a release's own data in TUF's metadata with its pieces (`update.pieces`)."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""The form of names of bundles and channels."""
OF_PART = "~"
"""Between the name of a bundle, an adapter of it and a key of its author; none of them has it."""
_KEY_DIGITS = 16
_PART_ROLE = re.compile(rf"{ROLE_PREFIX}({NAME.pattern}){OF_PART}({AUTHOR_NAME}){OF_PART}[0-9a-z]{{1,{_KEY_DIGITS}}}")
_FINGERPRINT = re.compile("[!-~]{0,100}")
RUNTIME_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}")
"""The form of a version of edgetune-runtime."""
_REMEDY = "publish the bundle again"


@dataclass(frozen=True)
class Release:
    """A version of a bundle in a channel.

    `version` grows with each release of the name, in whatever channel. `files` are those of the bundle by their paths
    in it, the manifest and its signature included. `formats` are those of its base. `manifest_schema` is that of the
    manifest, and `min_runtime` the oldest edgetune-runtime that may run it, empty for any. It is for a `share` of the
    devices, and `older` has the versions that others can take instead, newest first. `pieces` has those of the large
    texts among the files. `base` is the fingerprint of its base, and `authors` are the roles whose parts its manifest
    lets replace an adapter.
    """

    name: str
    channel: str
    version: int
    files: Mapping[str, FileEntry]
    formats: tuple[str, ...]
    manifest_schema: int
    min_runtime: str = ""
    share: float = 1.0
    older: tuple[int, ...] = ()
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    base: str = ""
    authors: tuple[str, ...] = ()

    @property
    def bundle(self) -> str:
        """The `identity` of the bundle: the digest of its manifest, unless it has parts of authors."""
        return identity({path: entry.sha256 for path, entry in self.files.items()})

    def to_json(self) -> str:
        """The text of a release."""
        files = {path: vars(entry) for path, entry in sorted(self.files.items())}
        pieces = {path: list(map(str, listed)) for path, listed in self.pieces.items()}
        return json.dumps({"schema": SCHEMA_VERSION, **vars(self), "files": files, "pieces": pieces}, indent=1) + "\n"


def path_of(name: str, channel: str, version: int | None = None) -> str:
    """The path of the newest release of a channel among the targets of a repository, or of an older one."""
    return f"{name}/{channel}.json" if version is None else f"{name}/{channel}@{version}.json"


@dataclass(frozen=True)
class ReleasedPart:
    """An author's part in a repository: the name of the role that signs it, its text, and what that says."""

    role: str
    data: bytes
    part: Part


def role_of_part(name: str, adapter: str, keyid: str) -> str:
    """The role that signs the parts of an adapter with one key of its author; the bundle's role delegates to it."""
    return f"{ROLE_PREFIX}{name}{OF_PART}{adapter}{OF_PART}{keyid[:_KEY_DIGITS]}"


def author_of(role: str) -> tuple[str, str]:
    """The bundle and the adapter whose parts a role signs; empty for a role that signs something else."""
    match = _PART_ROLE.fullmatch(role)
    return ("", "") if match is None else (match[1], match[2])


def path_of_part(role: str, channel: str) -> str:
    """The path of the newest part of a role in a channel among the targets of a repository."""
    name, _, author = role.removeprefix(ROLE_PREFIX).partition(OF_PART)
    return f"{name}/{channel}{OF_PART}{author}.json"


def parse_released_part(data: bytes, role: str) -> ReleasedPart:
    """The part in a file that a role has signed; errors as of `parse_part`, also for one of another adapter."""
    name, adapter = author_of(role)
    part = parse_part(data, f"the part of {adapter}")
    with parsing(f"the part of {adapter} in {name} is damaged", _REMEDY):
        for entry in part.files.values():
            file_entry(vars(entry))
        if len(data) > LONGEST_PART or (part.bundle, part.adapter.name) != (name, adapter):
            raise ValueError(f"it is of {part.adapter.name!r} in {shortened(part.bundle)!r}, with {len(data)} bytes")
    return ReleasedPart(role, data, part)


def newest_parts(release: Release, parts: Iterable[ReleasedPart]) -> list[ReleasedPart]:
    """The newest part of each adapter among those that a release allows, and that were made for its base."""
    fitting = [
        each for each in parts if each.role in release.authors and each.part.adapter.base_fingerprint == release.base
    ]
    ordered = sorted(fitting, key=lambda each: (each.part.version, each.role))
    return [*{each.part.adapter.name: each for each in ordered}.values()]


def with_parts(release: Release, parts: Iterable[ReleasedPart]) -> Release:
    """The release with parts and their files, beside those that the bundle's owner has released."""
    files = dict(release.files)
    for each in parts:
        files |= {**each.part.files, part_path(each.part.adapter.name): entry_of(each.data)}
    return replace(release, files=files)


def parse_release(data: bytes) -> Release:
    """The release in a file; VerificationError if it is damaged, IncompatibleError if it has a newer schema."""
    if len(data) > LONGEST_RELEASE:
        message = f"the release has {len(data)} bytes, and devices read up to {LONGEST_RELEASE}"
        raise VerificationError(message, "publish bundles of fewer files")
    with parsing("the release is damaged", _REMEDY):
        raw = json.loads(data)
        if raw["schema"] != SCHEMA_VERSION:
            message = f"the release has schema {shortened(str(raw['schema']))}, this runtime reads {SCHEMA_VERSION}"
            raise IncompatibleError(message, "update edgetune-runtime")
        files = {bundle_path(path): file_entry(entry) for path, entry in raw["files"].items()}
        release = Release(
            name=matching(NAME, raw["name"], "name"),
            channel=matching(NAME, raw["channel"], "channel"),
            version=whole(raw["version"], MOST_VERSION, "version"),
            files=files,
            formats=tuple(matching(WORD, name, "formats") for name in raw["formats"]),
            manifest_schema=whole(raw["manifest_schema"], MOST_VERSION, "manifest_schema"),
            min_runtime=_min_runtime(raw["min_runtime"]),
            share=_share(raw["share"]),
            older=tuple(whole(version, MOST_VERSION, "older") for version in raw["older"][:MOST_OLDER]),
            pieces={path: parse_pieces(listed, files[path].bytes) for path, listed in raw["pieces"].items()},
            base=matching(_FINGERPRINT, raw["base"], "base"),
            authors=tuple(matching(_PART_ROLE, role, "authors") for role in raw["authors"][:MOST_AUTHORS]),
        )
        manifest = release.files.get(MANIFEST_NAME)
        if manifest is None or manifest.bytes > LONGEST_MANIFEST or not release.formats:
            raise ValueError(f"it has no {MANIFEST_NAME} that can be read, or no formats")
        if folders_of(files) & files.keys():
            raise ValueError("it has a file in place of a folder")
    return release


def file_entry(raw: Mapping[str, Any]) -> FileEntry:
    """The digest and size in a record; ValueError for impossible ones."""
    return FileEntry(matching(DIGEST, raw["sha256"], "sha256"), whole(raw["bytes"], MOST_BYTES, "bytes"))


def _min_runtime(value: object) -> str:
    return "" if value == "" else matching(RUNTIME_VERSION, value, "min_runtime")


def _share(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"it is for the share {str(value)[:80]!r}")
    return float(value)
