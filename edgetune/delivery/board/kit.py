"""Reads kit.json, the list of a kit's files, and checks it against SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from edgetune_runtime.errors import NotFoundError, VerificationError

from .opening import Opening, parse_opening

SCHEMA_VERSION = 1
KIT_NAME = "kit.json"
SUMS_NAME = "SHA256SUMS"
PROGRAM_NAME = "board.pyz"
WHEELS_FOLDER = "wheels"
BUNDLE_FOLDER = "bundle"
ID_LENGTH = 16
"""Hex digits of a version id and of a wheels id."""
COPY_AGAIN = "copy the kit again"

_DIGEST = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

T = TypeVar("T")


@dataclass(frozen=True)
class KitFile:
    """Path in the kit, digest and size of one file."""

    path: str
    sha256: str
    bytes: int

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Kit:
    """The contents of kit.json; `text` is the file itself.

    `needs` has `instructions`, `glibc`, `ram_mb`, and `packages_mb`, the disk space of installed wheels. `wheels` is
    the id of the set of wheels; `bundle` the digest of the bundle's manifest, None without a bundle; `service` the
    settings of the systemd unit, `opening` how it and the check open the bundle.
    """

    name: str
    board: str
    machine: str
    python: str
    engines: tuple[str, ...]
    needs: Mapping[str, Any]
    wheels: str
    bundle: str | None
    service: Mapping[str, Any]
    opening: Opening
    files: tuple[KitFile, ...]
    text: str

    @property
    def version(self) -> str:
        """The version id: the first digits of the digest of kit.json."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:ID_LENGTH]

    @property
    def wheel_files(self) -> tuple[KitFile, ...]:
        """The wheels."""
        return self._below(WHEELS_FOLDER)

    @property
    def bundle_files(self) -> tuple[KitFile, ...]:
        """The bundle's files."""
        return self._below(BUNDLE_FOLDER)

    @property
    def version_files(self) -> tuple[KitFile, ...]:
        """The files that an installed version keeps: the bundle and the program that manages it."""
        return (*self.bundle_files, *(file for file in self.files if file.path == PROGRAM_NAME))

    def _below(self, folder: str) -> tuple[KitFile, ...]:
        return tuple(file for file in self.files if file.path.startswith(f"{folder}/"))


def read_kit(folder: Path) -> Kit:
    """The kit in `folder`, whose kit.json must be the one in SHA256SUMS; reads no other file.

    NotFoundError if it is no kit, VerificationError if either file is damaged or they list different digests.
    """
    kit = parse_kit(_text(folder / KIT_NAME))
    listed = _sums(_text(folder / SUMS_NAME))
    expected = {file.path: file.sha256 for file in kit.files}
    expected[KIT_NAME] = hashlib.sha256(kit.text.encode()).hexdigest()
    wrong = sorted(path for path in expected.keys() | listed.keys() if expected.get(path) != listed.get(path))
    if wrong:
        raise VerificationError(f"{SUMS_NAME} and {KIT_NAME} in {folder} differ in {wrong[0]}", COPY_AGAIN)
    return kit


def read_installed(version: Path) -> Kit:
    """The kit that an installed version came from; VerificationError if its kit.json is not the one of this version."""
    kit = parse_kit(_text(version / KIT_NAME))
    if kit.version != version.name:
        raise VerificationError(f"{version / KIT_NAME} is damaged", "install the kit again")
    return kit


def parse_kit(text: str) -> Kit:
    """The kit described by the text of a kit.json; VerificationError if it is damaged or of another version."""
    try:
        raw = json.loads(text)
        schema = _field(raw, "schema", int)
        if schema != SCHEMA_VERSION:
            message = f"{KIT_NAME} has schema {schema}, this program reads {SCHEMA_VERSION}"
            raise VerificationError(message, "make the kit again")
        bundle = raw.get("bundle")
        kit = Kit(
            name=_matching(_NAME, _field(raw, "name", str)),
            board=_field(raw, "board", str),
            machine=_field(raw, "machine", str),
            python=_field(raw, "python", str),
            engines=tuple(map(str, _field(raw, "engines", list))),
            needs=_needs(_field(raw, "needs", dict)),
            wheels=_matching(_NAME, _field(raw, "wheels", str)),
            bundle=None if bundle is None else _matching(_DIGEST, bundle),
            service=_service(_field(raw, "service", dict)),
            opening=parse_opening(raw.get("opening", {})),
            files=tuple(_file(entry) for entry in _field(raw, "files", list)),
            text=text,
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{KIT_NAME} is damaged: {error}", COPY_AGAIN) from error
    return kit


def _needs(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    instructions = [str(name) for name in _field(raw, "instructions", list)]
    numbers = {key: _field(raw, key, int) for key in ("ram_mb", "packages_mb")}
    return {"instructions": instructions, "glibc": _field(raw, "glibc", str), **numbers}


def _service(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: _field(raw, key, int) for key in ("port", "memory_max_mb")}


def _file(raw: Mapping[str, Any]) -> KitFile:
    path = _field(raw, "path", str)
    pure = PurePosixPath(path)
    if pure.is_absolute() or {"..", "."} & set(path.split("/")) or "\\" in path or "\n" in path or not pure.name:
        raise ValueError(f"it names {path!r}, which is outside the kit")
    size = _field(raw, "bytes", int)
    if size < 0:
        raise ValueError(f"{path} has {size} bytes")
    return KitFile(path, _matching(_DIGEST, _field(raw, "sha256", str)), size)


def _field(raw: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = raw.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} is {str(value)[:80]!r}")
    return value


def _matching(pattern: re.Pattern[str], value: str) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no valid name or digest")
    return value


def _sums(text: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        digest, separator, path = line.partition("  ")
        if not separator or not _DIGEST.fullmatch(digest):
            raise VerificationError(f"{SUMS_NAME} has the line {line[:80]!r}", COPY_AGAIN)
        found[path] = digest
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "give the folder of a kit that `edgetune kit` wrote"
        raise NotFoundError(f"{path.parent} is not a kit: it has no {path.name}", remedy) from error
    except OSError as error:
        raise VerificationError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise VerificationError(f"{path} is damaged: it is not UTF-8", COPY_AGAIN) from error
