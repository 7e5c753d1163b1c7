"""Decodes JSON of finite numbers, and checks the values that were read from JSON, also against type hints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

DIGEST = re.compile("[0-9a-f]{64}")
WORD = re.compile("[a-z0-9_]{1,60}")
"""Such as a machine, an engine or a format."""
_MOST_BITS = 64
MOST_BYTES = 10**15
"""No file is larger."""


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def refuse_constant(name: str) -> NoReturn:
    """ValueError for NaN and Infinity: the `parse_constant` of a JSON decoder."""
    raise ValueError(f"{name} is not a JSON number")


FINITE = json.JSONDecoder(parse_float=_finite, parse_constant=refuse_constant)
"""Decodes JSON; ValueError for numbers that Python reads but cannot write as JSON: NaN, Infinity and such as 1e999."""


def matching(pattern: re.Pattern[str], value: object, name: str) -> str:
    """`value` if it is a text of the pattern; ValueError with the name of the field otherwise."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{name} is {str(value)[:80]!r}")
    return value


def whole(value: object, most: int, name: str) -> int:
    """`value` if it is a whole number from 0 to `most`; ValueError with the name of the field otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name} is {str(value)[:80]!r}")
    return value


def dataclass_of(cls: Callable[..., T], raw: Mapping[str, Any]) -> T:
    """Make a dataclass from the fields in `raw`; TypeError names a field that is missing or has the wrong type."""
    values = {}
    for name, fits in _checks(cls).items():
        if name in raw:
            value = raw[name]
            if not fits(value):
                raise TypeError(f"{name} cannot be {str(value)[:80]!r}")
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


@cache
def _checks(cls: Callable[..., object]) -> Mapping[str, Callable[[Any], bool]]:
    """For each field of a dataclass, whether a value has its type; made once, as a manifest may have 1,000 adapters."""
    return {name: type_check(hint) for name, hint in get_type_hints(cls).items()}


def type_check(hint: Any) -> Callable[[Any], bool]:  # noqa: ANN401 - type hints have no type
    """A function that says whether a value read from JSON has this type.

    Of generic types, it knows `Mapping`, `tuple` of one type, and unions.
    """
    origin, parts = get_origin(hint), [type_check(part) for part in get_args(hint) if part is not ...]
    if origin is Mapping:
        key, item = parts
        return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(item, value.values()))
    if origin is tuple:
        return lambda value: isinstance(value, list | tuple) and all(map(parts[0], value))
    if origin is UnionType:
        return lambda value: any(fits(value) for fits in parts)
    if origin is not None:
        raise TypeError(f"no check for {hint}")
    types = (int, float) if hint is float else (hint,)
    return lambda value: hint is Any or (type(value) in types and not _is_too_large(value))


def _is_too_large(value: object) -> bool:
    """Whether it is an integer of more than 64 bits, which may be too large for a float."""
    return isinstance(value, int) and value.bit_length() > _MOST_BITS
