"""Strings of an answer that are texts of the prompt, where the answer's JSON schema says so with `x-from-prompt`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgetune_runtime.errors import UsageError

from .schema import COMBINING, Schema, changed, children

FROM_PROMPT = "x-from-prompt"
"""The key of a string's schema that is true where the string is a text of the prompt. To others it is an annotation."""
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_BESIDE_COMBINING = _ANNOTATIONS | {"type", "discriminator", "$defs", "definitions", "$schema", "$id"}
_DEFINITION = "x-texts-of-the-prompt"
_ALONE = "write {type: string, x-from-prompt: true} alone, or as one of anyOf"
_EXACTLY = "a text of the prompt, exactly as it is written there"

_SIGNS = "".join(filter(lambda sign: unicodedata.category(sign)[0] == "M", map(chr, range(0x300, 0x1E00))))
"""Vowel signs and accents, which are written with the letter before them."""
_WORD = re.compile(
    # A letter of a script without spaces is a word of its own.
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    rf"|\d+|[^\W\d_](?:[^\W\d_]|[{_SIGNS}\u200c\u200d])*|[^\w\s]|_"
)
_MAX_TEXTS, _MAX_CHARACTERS = 1500, 1500
_MAX_WORDS, _MIN_WORDS = 24, 8
"""Of one text. The more words a prompt has, the fewer a text has, so that compiling 1500 takes about 10 ms."""


def texts_of(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """What `texts_in` reads of a prompt: all messages but the system prompt."""
    return [str(message.get("content") or "") for message in messages if message["role"] != "system"]


def texts_in(prompt: Iterable[str]) -> dict[str, None]:
    """Every text of 1 to 24 words in the messages of a prompt, in their order.

    Numbers and marks are words too. The texts have fewer words from 63 words of the prompt on, and there are none in
    one of more than 187 words or 1500 characters.
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


def reads_prompt(schema: Schema) -> bool:
    """Whether a string of the schema is a text of the prompt.

    UsageError where the key is neither true nor false, and where something else limits the string too: what it takes to
    combine that with the texts depends on the prompt.
    """
    pending: list[Any] = [schema]
    is_marked, reason = False, ""
    for part in pending:
        pending += children(part)
        if not isinstance(part, dict):
            continue
        is_marked |= _is_marked(part)
        if part is not schema and "$id" in part:
            reason = reason or "a part with an $id of its own"
        if part.get("properties") and part.get("patternProperties"):
            reason = reason or "properties beside patternProperties"
        combining = COMBINING & part.keys()
        if combining and (len(combining) > 1 or "allOf" in part or part.keys() - _BESIDE_COMBINING - combining):
            reason = reason or f"{min(combining)} beside other limits"
    if is_marked and reason:
        raise UsageError(f"{FROM_PROMPT} is in a schema that has {reason}", _ALONE)
    return is_marked


def with_texts(schema: Schema, texts: Sequence[str]) -> Schema:
    """The schema with these texts as the values of strings that are from the prompt."""
    reference = {"$ref": f"#/$defs/{_DEFINITION}"}
    filled: Schema = changed(schema, lambda part: reference if _is_marked(part) else part)
    definitions = filled.get("$defs")
    others = definitions if isinstance(definitions, dict) else {}
    return {**filled, "$defs": {**others, _DEFINITION: {"enum": list(texts)}}}


def without_texts(schema: Schema) -> Schema:
    """The schema for programs that do not know the key: it is told in the description of a string that has none."""

    def told(part: Schema) -> Schema:
        if not _is_marked(part):
            return part
        return {"description": _EXACTLY, **{key: value for key, value in part.items() if key != FROM_PROMPT}}

    return dict(changed(schema, told))


def _is_marked(schema: Schema) -> bool:
    mark = schema.get(FROM_PROMPT, False)
    if mark is False:
        return False
    if mark is not True:
        raise UsageError(f"{FROM_PROMPT} is {mark!r} in the schema", "write true")
    beside = schema.keys() - _ANNOTATIONS - {FROM_PROMPT, "type"}
    if beside or schema.get("type") != "string":
        what = f"has {min(beside)} beside it" if beside else "is not beside type: string"
        raise UsageError(f"{FROM_PROMPT} {what} in the schema", _ALONE)
    return True
