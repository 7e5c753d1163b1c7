"""Checks the JSON that the board program answers: a board may be hostile, and a login shell may print anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from edgetune_runtime.wording import printable

_VERSION = re.compile("[0-9a-f]{16}")
_DIGEST = re.compile("[0-9a-f]{64}")
_ENGINE = re.compile("[a-z0-9_]{1,60}")
_STATE = re.compile("current|previous|")
_MOST_WARNINGS, _MOST_CHARACTERS = 5, 300

T = TypeVar("T")


def installed(value: Any) -> tuple[str, bool, tuple[str, ...]]:  # noqa: ANN401 - JSON
    """The version of `install`, whether anything changed, and warnings; ValueError if it is anything else."""
    reply = _of(dict, value)
    warnings = [printable(_of(str, text))[:_MOST_CHARACTERS] for text in _of(list, reply.get("warnings"))]
    return version(reply), _of(bool, reply.get("changed")), tuple(warnings[:_MOST_WARNINGS])


def version(value: Any) -> str:  # noqa: ANN401 - JSON
    """The version of `rollback`; ValueError if it is anything else."""
    return _matching(_VERSION, _of(dict, value).get("version"))


def versions(value: Any) -> list[Mapping[str, Any]]:  # noqa: ANN401 - JSON
    """The versions of `list`; ValueError if it is anything else."""
    return [
        {
            "version": version(item),
            "state": _matching(_STATE, item.get("state")),
            "bundle": _matching(_DIGEST, item.get("bundle")),
            "engines": [_matching(_ENGINE, name) for name in _of(list, item.get("engines"))],
        }
        for item in _of(list, value)
    ]


def missing(value: Any, sizes: Mapping[str, int]) -> Mapping[str, int]:  # noqa: ANN401 - JSON
    """How many bytes the board has of each file that it lacks; ValueError if it is anything else.

    `sizes` are those of the kit's files, by digest.
    """
    offsets: dict[str, int] = _of(dict, value)
    for digest, count in offsets.items():
        if digest not in sizes or not 0 <= _of(int, count) <= sizes[digest]:
            raise ValueError("it asks for a file that the kit does not have")
    return offsets


def _of(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:80]!r} is no {kind.__name__}")
    return value


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if not pattern.fullmatch(_of(str, value)):
        raise ValueError(f"{str(value)[:80]!r} is not expected")
    return str(value)
