"""Strings of an answer that are texts of the prompt, where the answer's JSON schema says so with `x-from-prompt`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgetune_runtime.errors import UsageError

FROM_PROMPT = "x-from-prompt"
"""The key of a string's schema that is true where the string is a text of the prompt. To others it is an annotation."""
_BESIDE = frozenset({FROM_PROMPT, "type", "title", "description"})
_DEFINITION = "x-texts-of-the-prompt"
# A digit, a mark and a letter of a script without spaces count as words of their own.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|\d+|[^\W\d_]+|[^\w\s]|_"
)
_MAX_TEXTS, _MAX_CHARACTERS = 1500, 1500
_MAX_WORDS, _MIN_WORDS = 24, 8
"""Of one text. The more words a prompt has, the fewer a text has, so that compiling 1500 takes about 10 ms."""


def texts_of(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """What `texts_in` reads of a prompt: all messages but the system prompt."""
    return [str(message.get("content") or "") for message in messages if message["role"] != "system"]


def texts_in(prompt: Iterable[str]) -> dict[str, None]:
    """Every text of 1 to 24 words in the messages of a prompt, in their order.

    Fewer words from 63 words of the prompt on; none at all of a prompt of more than 187 words or 1500 characters.
    """
    messages = list(prompt)
    if sum(map(len, messages)) > _MAX_CHARACTERS:
        return {}
    words = [[match.span() for match in _WORD.finditer(message)] for message in messages]
    longest = min(_MAX_WORDS, _MAX_TEXTS // max(1, sum(map(len, words))))
    if longest < _MIN_WORDS:
        return {}
    return {
        message[begin : places[last][1]]: None
        for message, places in zip(messages, words, strict=True)
        for first, (begin, _) in enumerate(places)
        for last in range(first, min(len(places), first + longest))
    }


def reads_prompt(schema: Any) -> bool:  # noqa: ANN401 - any JSON value
    """Whether a string of the schema is a text of the prompt.

    UsageError where the key has another value than true or false, or a keyword beside it that limits the string too.
    """
    return bool(list(_marked(schema)))


def with_texts(schema: Any, texts: Sequence[str]) -> Any:  # noqa: ANN401 - any JSON value
    """The schema with these texts as the values of strings that are from the prompt."""
    filled = _replaced(schema, {"$ref": f"#/$defs/{_DEFINITION}"})
    return {**filled, "$defs": {**filled.get("$defs", {}), _DEFINITION: {"enum": list(texts)}}}


def without_texts(schema: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The schema with any string in place of those from the prompt."""
    return _replaced(schema, {"type": "string"})


def _marked(schema: Any) -> Iterator[Any]:  # noqa: ANN401 - any JSON value
    if isinstance(schema, dict) and _is_marked(schema):
        yield schema
    elif isinstance(schema, dict | list):
        for part in schema.values() if isinstance(schema, dict) else schema:
            yield from _marked(part)


def _replaced(schema: Any, string: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(schema, list):
        return [_replaced(each, string) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return dict(string) if _is_marked(schema) else {key: _replaced(each, string) for key, each in schema.items()}


def _is_marked(schema: Mapping[str, Any]) -> bool:
    # A property may have this name.
    mark = schema.get(FROM_PROMPT, False)
    if isinstance(mark, dict) or mark is False:
        return False
    if mark is not True:
        raise UsageError(f"{FROM_PROMPT} is {mark!r} in the schema", "write true")
    beside = schema.keys() - _BESIDE
    if beside or schema.get("type") != "string":
        what = f"has {min(beside)} beside it" if beside else "is not beside type: string"
        raise UsageError(f"{FROM_PROMPT} {what} in the schema", "write {type: string, x-from-prompt: true} alone")
    return True
