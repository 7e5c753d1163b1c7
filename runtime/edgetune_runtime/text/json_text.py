"""Reads text that may be JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_CONTAINERS = frozenset({dict, list})


def is_deeper(value: Any, levels: int) -> bool:  # noqa: ANN401 - any JSON value
    """Whether lists and objects in a JSON value are nested more than `levels` deep; the value is the first."""
    containers: list[Any] = [[value]]
    for _ in range(levels + 1):
        within = (outer.values() if type(outer) is dict else outer for outer in containers)
        containers = [each for inner in within for each in inner if type(each) in _CONTAINERS]
    return bool(containers)


def leaves(value: Any) -> Iterator[Any]:  # noqa: ANN401 - any JSON value
    """The texts, numbers, true, false and null in a JSON value, whose lists may be tuples, in order."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def json_or_none(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a text in JSON; None for null and for any other text, also one that is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
