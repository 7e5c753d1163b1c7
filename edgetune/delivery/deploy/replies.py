"""Checks the JSON that the board program answers: a board may be hostile, and a login shell may print anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from edgetune_runtime.store.kit import ID
from edgetune_runtime.wording import printable
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

_MOST_WARNINGS, _MOST_CHARACTERS = 5, 300


class _Version(BaseModel):
    model_config = ConfigDict(strict=True)

    version: Annotated[str, Field(pattern=f"^{ID.pattern}$")]


class _Installed(_Version):
    changed: bool
    warnings: list[str]


class _Listed(_Version):
    state: Literal["current", "previous", ""]
    bundle: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    engines: list[Annotated[str, Field(pattern="^[a-z0-9_]{1,60}$")]]


_LISTING = TypeAdapter(list[_Listed])
_OFFSETS = TypeAdapter(dict[str, int], config=ConfigDict(strict=True))


def installed(value: object) -> tuple[str, bool, tuple[str, ...]]:
    """The version of `install`, whether anything changed, and warnings; ValueError if it is anything else."""
    reply = _Installed.model_validate(value)
    warnings = (printable(text)[:_MOST_CHARACTERS] for text in reply.warnings[:_MOST_WARNINGS])
    return reply.version, reply.changed, tuple(warnings)


def version(value: object) -> str:
    """The version of `rollback`; ValueError if it is anything else."""
    return _Version.model_validate(value).version


def versions(value: object) -> list[Mapping[str, Any]]:
    """The versions of `list`; ValueError if it is anything else."""
    return [item.model_dump() for item in _LISTING.validate_python(value)]


def missing(value: object, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """How many bytes the board has of each file that it lacks; ValueError if it is anything else.

    `sizes` are those of the kit's files, by digest.
    """
    offsets = _OFFSETS.validate_python(value)
    if any(not 0 <= count <= sizes.get(digest, -1) for digest, count in offsets.items()):
        raise ValueError("it asks for a file that the kit does not have")
    return offsets
