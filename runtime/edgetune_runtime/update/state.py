"""The state of updates on a device: where they come from, which versions are refused, and the time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import NotFoundError, UsageError, parsing
from edgetune_runtime.formats.regular_file import open_regular
from edgetune_runtime.store.durable import write_text
from edgetune_runtime.type_checks import dataclass_of

FOLDER = "update"
TRUSTED_FOLDER = "metadata"
"""Folder in FOLDER with the repository's metadata that this device trusts."""
DEFAULT_CHANNEL = "stable"
STATE_NAME, ROOT_NAME = "state.json", "root.json"
_TRIES = 2
"""How often a version may fail before it is not tried again."""


@dataclass(frozen=True)
class UpdateState:
    """The state of a prefix.

    `formats` are those that the user wants, if any. `floors` has the newest release of each name that was the current
    one here: older ones are refused, also after a rollback. `failures` counts by the digest of a bundle's manifest how
    often it did not answer as built, `refused` has those that a user does not want, with the reason. `not_before` is
    when the newest metadata was signed. `switching` is the id of the version that a switch began to, empty when it has
    ended. `device` is the id that says which releases for a share of the devices this one takes, `report_to` where it
    reports what it runs, and `quota_mb` the most that the files of all versions may take, 0 for any.
    """

    repo: str = ""
    bundle: str = ""
    channel: str = DEFAULT_CHANNEL
    formats: tuple[str, ...] = ()
    floors: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    not_before: str = "1970-01-01T00:00:00+00:00"
    switching: str = ""
    device: str = ""
    report_to: str = ""
    quota_mb: float = 0.0

    @property
    def time(self) -> datetime:
        """A time that has passed for certain."""
        return datetime.fromisoformat(self.not_before).astimezone(UTC)

    def why_refused(self, digest: str) -> str | None:
        """Why this device does not want the bundle with this manifest; None if it does."""
        if digest in self.refused:
            return self.refused[digest]
        failed = self.failures.get(digest, 0)
        return None if failed < _TRIES else f"it failed its check {failed} times"


def read_state(prefix: Path) -> UpdateState:
    """The state of a prefix, a new one if there is none; VerificationError if it is damaged."""
    path = prefix / FOLDER / STATE_NAME
    try:
        with open_regular(path, follows_links=True) as file:
            data = file.read()
    except FileNotFoundError:
        return UpdateState()
    # Without its floors, an old version could be passed off as new.
    remedy = "restore it from a backup; if you delete it, old releases are accepted too"
    with parsing(f"{path} is damaged", remedy):
        values = json.loads(data)
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
        if values.pop("crc32", None) != _crc32(values):
            raise ValueError("its checksum is wrong")
        state = dataclass_of(UpdateState, values)
        _ = state.time
    return state


def write_state(prefix: Path, state: UpdateState) -> None:
    """Write the state, whole or not at all."""
    path = prefix / FOLDER / STATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text_of_state(asdict(state)))


def text_of_state(values: Mapping[str, Any]) -> str:
    """The contents of the file with these values, and their checksum: a flipped bit may be another valid time."""
    return json.dumps({**values, "crc32": _crc32(values)}, indent=1, sort_keys=True) + "\n"


def _crc32(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def read_trusted_root(prefix: Path) -> bytes | None:
    """The root that updates of a prefix begin with; None if there is none."""
    path = prefix / FOLDER / ROOT_NAME
    return path.read_bytes() if path.is_file() else None


def read_root_file(path: Path) -> bytes:
    """The contents of --root, without a check of the signatures, which needs a library of an extra.

    NotFoundError if it cannot be read, UsageError if it is not a root.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"cannot read --root {path}: {error.strerror}", "give a file N.root.json") from error
    try:
        is_root = json.loads(data)["signed"]["_type"] == "root"
    except (ValueError, LookupError, TypeError, RecursionError):
        is_root = False
    if not is_root:
        raise UsageError(f"{path} has no root of a repository", "give a N.root.json of `edgetune keys init`")
    return data


def write_trusted_root(prefix: Path, data: bytes) -> None:
    """Trust another root from now on."""
    (prefix / FOLDER).mkdir(parents=True, exist_ok=True)
    write_text(prefix / FOLDER / ROOT_NAME, data.decode())


def refuse_login(option: str, address: str) -> None:
    """UsageError for an address with a login, which would not be sent, and whose password messages would show."""
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise UsageError(f"{option} has a login in its address", "remove it: requests are made without one")
