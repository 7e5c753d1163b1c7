"""Reads request bodies and the members of JSON objects by type; a member of the wrong type is refused by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from edgetune_runtime.text.json_text import is_deeper

from .problems import RequestError

T = TypeVar("T")

_DEEPEST = 128
"""Levels of objects and lists; code that walks them calls itself for each."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_INTEGER_BITS = 63


def read_object(data: bytes) -> Mapping[str, Any]:
    """The JSON object in a request body, as UTF-8; RequestError for anything else."""
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        message = f"the body is not JSON: {error}" if data else "the body is empty"
        raise RequestError(message, "send a JSON object") from error
    except ValueError as error:
        raise RequestError("a number in the body has thousands of digits", "send a smaller number") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {_kind_of(value)}", "send a JSON object")
    if is_deeper(value, _DEEPEST):
        raise RequestError(f"the body has more than {_DEEPEST} levels of lists and objects", "send fewer levels")
    if _SURROGATE.search(text):
        _require_whole_characters(value)
    return value


class Fields:
    """The members of a JSON object, called by their path in the request; null counts as missing."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values, self._path = values, path

    def text(self, name: str) -> str | None:
        """A string."""
        return self._typed(name, str, "a string")

    def needed_text(self, name: str) -> str:
        """A string that must be there and not be empty."""
        value = self.text(name)
        if not value:
            self.refuse(name, "a string that is not empty")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._typed(name, bool, "true or false")
        return default if value is None else value

    def integer(self, name: str) -> int | None:
        """A whole number of 64 bits; 3.0 counts as one, as clients in JavaScript send it."""
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            self.refuse(name, "a whole number")
        if value is not None and value.bit_length() > _INTEGER_BITS:
            self.refuse(name, "a smaller number")
        return value

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(name, "a number")
        if not abs(value) <= sys.float_info.max:
            self.refuse(name, "a smaller number")
        return value

    def texts(self, name: str) -> list[str]:
        """A string or a list of them; none if it is missing."""
        value = self.values.get(name)
        if value is None:
            return []
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            self.refuse(name, "a string or a list of strings")
        return texts

    def mapping(self, name: str) -> Fields | None:
        """A JSON object."""
        value = self._typed(name, dict, "a JSON object")
        return None if value is None else Fields(value, self._path_of(name))

    def objects(self, name: str) -> list[Fields]:
        """A list of JSON objects; empty if it is missing."""
        items = self._typed(name, list, "a list of JSON objects") or []
        if not all(isinstance(item, dict) for item in items):
            self.refuse(name, "a list of JSON objects")
        return [Fields(item, f"{self._path_of(name)}[{place}]") for place, item in enumerate(items)]

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """One of these strings."""
        value = self.text(name)
        if value is not None and value not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
        return value

    def forbid(self, names: Mapping[str, object]) -> None:
        """Refuse options that are not supported, unless they have the value that changes nothing."""
        for name, neutral in names.items():
            value = self.values.get(name)
            if value is not None and value != neutral:
                raise RequestError(f"{self._path_of(name)} is not supported", "leave it out", param=self._path_of(name))

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise RequestError: the member called `name` is not what is expected."""
        path, value = self._path_of(name), self.values.get(name)
        actual = "missing" if value is None else _shortened(value)
        raise RequestError(f"{path} is {actual}", f"give {expected}", param=path)

    def _typed(self, name: str, kind: type[T], expected: str) -> T | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, kind):
            self.refuse(name, expected)
        return value

    def _path_of(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _kind_of(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body is not JSON: {name} is not a JSON number", "send a JSON object")


def _require_whole_characters(value: object) -> None:
    """RequestError for half a surrogate pair, which is not a character and cannot be sent back."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        character = str(error.object)[error.start]
        raise RequestError(f"{character!a} in the body is half a character", "send whole characters") from error
