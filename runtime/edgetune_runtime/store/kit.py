"""Reads kit.json, the list of a kit's files, and checks it against SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from edgetune_runtime.bundle.files import bundle_path
from edgetune_runtime.bundle.parts import identity
from edgetune_runtime.bundle.records import MANIFEST_NAME
from edgetune_runtime.errors import NotFoundError, VerificationError, parsing
from edgetune_runtime.formats.regular_file import read_up_to
from edgetune_runtime.type_checks import DIGEST, MOST_BYTES, WORD, matching, whole

from .opening import Opening, parse_opening

SCHEMA_VERSION = 1
KIT_NAME = "kit.json"
SUMS_NAME = "SHA256SUMS"
PROGRAM_NAME = "board.pyz"
WHEELS_FOLDER = "wheels"
BUNDLE_FOLDER = "bundle"
ID_LENGTH = 16
"""Hex digits of a version id and of a wheels id."""
ID = re.compile(f"[0-9a-f]{{{ID_LENGTH}}}")
COPY_AGAIN = "copy the kit again"
_INSTALL_AGAIN = "install the kit again"

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_VERSION = re.compile(r"\d{1,3}\.\d{1,3}", re.ASCII)
# Without control characters, of which a terminal or a unit's file would make something else.
_LINE = re.compile(r"[^\0-\x1f\x7f-\x9f\u2028\u2029]{1,200}")
# pip would take a leading - for an option.
_WHEEL = re.compile(rf"{WHEELS_FOLDER}/[A-Za-z0-9_][A-Za-z0-9_.!+-]{{0,199}}\.whl")
_MOST_MB, _MOST_TEXT_BYTES = 10**9, 10**7

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
    the id of the set of wheels; `bundle` the bundle's `identity`; `service` the settings of the systemd unit, `opening`
    how it and the check open the bundle. `release` is the bundle's version in a repository, 0 if a kit brought it.
    """

    name: str
    board: str
    machine: str
    python: str
    engines: tuple[str, ...]
    needs: Mapping[str, Any]
    wheels: str
    bundle: str
    service: Mapping[str, Any]
    opening: Opening
    files: tuple[KitFile, ...]
    text: str
    release: int = 0

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

    NotFoundError if it is not a kit, VerificationError if either file is damaged or they list different digests.
    """
    kit = parse_kit(kit_text(folder / KIT_NAME))
    listed = _sums(kit_text(folder / SUMS_NAME))
    expected = {file.path: file.sha256 for file in kit.files}
    expected[KIT_NAME] = hashlib.sha256(kit.text.encode()).hexdigest()
    wrong = sorted(path for path in expected.keys() | listed.keys() if expected.get(path) != listed.get(path))
    if wrong:
        raise VerificationError(f"{SUMS_NAME} and {KIT_NAME} in {folder} differ in {wrong[0]}", COPY_AGAIN)
    return kit


def read_installed(version: Path, remedy: str = _INSTALL_AGAIN) -> Kit:
    """The kit that an installed version came from; VerificationError, with `remedy`, if its kit.json is not the one of
    this version."""
    kit = parse_kit(kit_text(version / KIT_NAME, remedy), str(version / KIT_NAME), remedy)
    if kit.version != version.name:
        raise VerificationError(f"{version / KIT_NAME} is damaged", remedy)
    return kit


def version_key(version: str) -> tuple[int, ...]:
    """What orders versions, such as those of glibc and of edgetune-runtime."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def wheels_id(python: str, files: Iterable[KitFile]) -> str:
    """The id of an environment: the first digits of the digest of the Python version and of all wheels' digests."""
    wheels = sorted((file.path, file.sha256) for file in files if file.path.startswith(f"{WHEELS_FOLDER}/"))
    text = "".join(f"{sha256} {path}\n" for path, sha256 in wheels)
    return hashlib.sha256(f"{python}\n{text}".encode()).hexdigest()[:ID_LENGTH]


def bundle_identity(files: Iterable[KitFile]) -> str:
    """The `identity` of the bundle in a kit; KeyError if it has no manifest."""
    folder = f"{BUNDLE_FOLDER}/"
    return identity({file.path.removeprefix(folder): file.sha256 for file in files if file.path.startswith(folder)})


def parse_kit(text: str, where: str = KIT_NAME, remedy: str = COPY_AGAIN) -> Kit:
    """The kit described by the text of a kit.json; VerificationError if it is damaged or of another version.

    `where` is the file for its messages, and `remedy` what helps if it is damaged.
    """
    if len(text.encode()) > _MOST_TEXT_BYTES:
        message = f"{KIT_NAME} has more than {_MOST_TEXT_BYTES} bytes"
        raise VerificationError(message, "make the kit, or publish the bundle and its parts, with fewer files")
    with parsing(f"{where} is damaged", remedy):
        raw = json.loads(text)
        schema = _field(raw, "schema", int)
        if schema != SCHEMA_VERSION:
            message = f"{where} has schema {schema}, this program reads {SCHEMA_VERSION}"
            raise VerificationError(message, "make the kit again")
        kit = Kit(
            name=_text_of(raw, "name", PLAIN_NAME),
            board=_text_of(raw, "board", _LINE),
            machine=_text_of(raw, "machine", WORD),
            python=_text_of(raw, "python", _VERSION),
            engines=_words(raw, "engines"),
            needs=_needs(_field(raw, "needs", dict)),
            wheels=_text_of(raw, "wheels", ID),
            bundle=_text_of(raw, "bundle", DIGEST),
            service=_service(_field(raw, "service", dict)),
            opening=parse_opening(raw.get("opening", {})),
            files=tuple(_file(entry) for entry in _field(raw, "files", list)),
            text=text,
            release=whole(raw.get("release", 0), MOST_BYTES, "release"),
        )
        _check_consistent(kit)
    return kit


def _check_consistent(kit: Kit) -> None:
    """ValueError unless the fields agree: an environment belongs to the wheels that are listed."""
    digests = {file.path: file.sha256 for file in kit.files}
    if len(digests) != len(kit.files):
        raise ValueError("it lists a file twice")
    if not kit.engines:
        raise ValueError("it has no engine")
    if kit.wheels != wheels_id(kit.python, kit.files):
        raise ValueError(f"wheels is {kit.wheels}, which is not the id of the listed wheels")
    if f"{BUNDLE_FOLDER}/{MANIFEST_NAME}" not in digests:
        raise ValueError("it lists no manifest of a bundle")
    if kit.bundle != bundle_identity(kit.files):
        raise ValueError(f"bundle is {kit.bundle}, which is not the identity of the listed bundle")


def _needs(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    numbers = {key: whole(raw.get(key), _MOST_MB, key) for key in ("ram_mb", "packages_mb")}
    return {"instructions": _words(raw, "instructions"), "glibc": _text_of(raw, "glibc", _VERSION), **numbers}


def _service(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    most = {"port": 65535, "memory_max_mb": _MOST_MB}
    settings = {key: whole(raw.get(key), limit, key) for key, limit in most.items()}
    if 0 in settings.values():
        raise ValueError(f"service is {settings}")
    return settings


def _file(raw: Mapping[str, Any]) -> KitFile:
    path = _field(raw, "path", str)
    if path.startswith(f"{BUNDLE_FOLDER}/"):
        bundle_path(path.removeprefix(f"{BUNDLE_FOLDER}/"))
    elif not (_WHEEL.fullmatch(path) or PLAIN_NAME.fullmatch(path)) or path in (KIT_NAME, SUMS_NAME):
        raise ValueError(f"it names {path[:80]!r}, which is outside the kit, or no file of one")
    return KitFile(path, _text_of(raw, "sha256", DIGEST), whole(raw.get("bytes"), MOST_BYTES, "bytes"))


def _words(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(matching(WORD, value, key) for value in _field(raw, key, list))


def _text_of(raw: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    return matching(pattern, raw.get(key), key)


def _field(raw: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = raw.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} is {str(value)[:80]!r}")
    return value


def _sums(text: str) -> dict[str, str]:
    digests = {}
    for line in text.splitlines():
        digest, separator, path = line.partition("  ")
        if not separator or not DIGEST.fullmatch(digest):
            raise VerificationError(f"{SUMS_NAME} has the line {line[:80]!r}", COPY_AGAIN)
        digests[path] = digest
    return digests


def kit_text(path: Path, remedy: str = COPY_AGAIN) -> str:
    """kit.json or SHA256SUMS; errors as of `read_kit`."""
    try:
        data = read_up_to(path, _MOST_TEXT_BYTES)
        if data is None:
            raise VerificationError(f"{path} has more than {_MOST_TEXT_BYTES} bytes", remedy)
        return data.decode()
    except NotFoundError as error:
        message = f"{path.parent} is not a kit: it has no {path.name}"
        raise NotFoundError(message, "give the folder of a kit that `edgetune kit` wrote") from error
    except UnicodeDecodeError as error:
        raise VerificationError(f"{path} is damaged: it is not UTF-8", remedy) from error
