"""Replaces what regular expressions find in texts, within a time limit."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.processes.child_process import has_python, run
from edgetune_runtime.text.json_text import is_deeper, json_or_none, leaves

REDACTED = "[redacted]"
MAX_S = 5.0
_MAX_DEPTH = 100
"""Levels of JSON in a text, far fewer than Python can walk."""
_PROGRAM = Path(__file__).with_name("redaction_main.py")
_LOG = logging.getLogger(__name__)


class Redaction:
    """Replaces what `patterns`, Python's regular expressions, find; UsageError for an invalid one."""

    def __init__(self, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UsageError(f"redact is {patterns!r}", "give a list of regular expressions")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"{pattern!r} is not a regular expression: {error}", "see Python's module re"
                ) from error
        if patterns and not has_python():
            raise UsageError("redaction runs in a Python of its own, which this app does not have", "leave out redact")
        self.patterns = list(patterns)

    def clean(self, text: str, values: Sequence[Any] = ()) -> tuple[str, list[Any]]:
        """A text and JSON values with REDACTED in place of what was found; REDACTED alone if that takes over MAX_S
        or no process can be started for it.

        Of values, the texts and numbers are searched, not keys of objects. So are the values of a text that is JSON,
        which stays JSON if what was found is within them; REDACTED is in place of one that is nested too deeply.
        """
        if not self.patterns:
            return text, list(values)
        texts = list(dict.fromkeys(_texts([text, *values])))
        whole, *cleaned = self._clean_values([text, *values], dict(zip(texts, self._cleaned(texts), strict=True)))
        return whole, cleaned

    def _clean_values(self, values: Sequence[Any], found: Mapping[str, str]) -> list[Any]:
        """The values with what was found in their texts, and in those of texts that are JSON."""
        texts = [str(leaf) for leaf in _searched(values)]
        cleaned = {leaf: found[leaf] for leaf in texts}
        decoded = {leaf: value for leaf in cleaned if (value := _decoded(leaf)) is not None}
        for leaf in [leaf for leaf, value in decoded.items() if is_deeper(value, _MAX_DEPTH)]:
            cleaned[leaf] = REDACTED
            del decoded[leaf]
        inner = dict(zip(decoded, self._clean_values([*decoded.values()], found), strict=True)) if decoded else {}
        changed = [leaf for leaf in decoded if inner[leaf] != decoded[leaf]]
        if changed:
            again = self._cleaned([_written_as(leaf, decoded[leaf], inner[leaf]) for leaf in changed])
            for leaf, text in zip(changed, again, strict=True):
                # Expressions may look at what is around a value, and at its form, which is another one now.
                is_less = text.count(REDACTED) < cleaned[leaf].count(REDACTED)
                cleaned[leaf] = REDACTED if is_less else text
        replacements = iter([cleaned[leaf] for leaf in texts])
        return [_replaced(value, replacements) for value in values]

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        # Python's expressions may backtrack for years and hold the interpreter meanwhile, so that no thread could stop
        # them; a library with other expressions would be one more to install on each board.
        request = json.dumps({"patterns": self.patterns, "texts": list(texts), "replacement": REDACTED})
        try:
            ended = run([sys.executable, "-I", "-S", "-B", str(_PROGRAM)], timeout_s=MAX_S, stdin=request.encode())
        except OSError as error:
            _LOG.warning("redacted whole texts, as no process can be started to look for the expressions: %s", error)
            return [REDACTED] * len(texts)
        try:
            cleaned: list[str] = json.loads(ended.output)
        except ValueError:
            _LOG.warning("redacted whole texts, as looking for the expressions %s", ended.how)
            return [REDACTED] * len(texts)
        return cleaned


def _texts(values: Sequence[Any]) -> Iterator[str]:
    """The texts and numbers in JSON values, and those in texts that are JSON."""
    for leaf in map(str, _searched(values)):
        yield leaf
        inner = _decoded(leaf)
        if inner is not None and not is_deeper(inner, _MAX_DEPTH):
            yield from _texts([inner])


def _decoded(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """The object, list or text that `text` is as JSON, or None."""
    value = json_or_none(text)
    return value if isinstance(value, dict | list | str) else None


def _written_as(text: str, own: object, value: object) -> str:
    """A value as JSON, compact if `text`, the JSON of `own`, is."""
    is_compact = text == json.dumps(own, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if is_compact else None)


def _searched(value: Any) -> Iterator[str | float]:  # noqa: ANN401 - any JSON value
    """The texts and numbers in a JSON value."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, str | int | float) and not isinstance(leaf, bool))


def _replaced(value: Any, texts: Iterator[str]) -> Any:  # noqa: ANN401 - any JSON value
    """The JSON value with these texts in place of its leaves; a number whose text is as it was stays one."""
    if isinstance(value, dict):
        return {key: _replaced(inner, texts) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, texts) for inner in value]
    if next(_searched(value), None) is None:
        return value
    text = next(texts)
    return value if text == str(value) else text
