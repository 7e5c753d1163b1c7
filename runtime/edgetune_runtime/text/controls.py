"""Control tokens in texts: keeps those that users write from being parsed, and splits texts that tokenize slowly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from edgetune_runtime.errors import UsageError

MARK = "\ufdd0"
"""Inserted after the first character of a control token's name that is only text: a code point of no character."""

_MAX_AT_ONCE = 256
_AT_ONCE = 16
"""llama.cpp's time grows with the square of the control tokens in a text: more than 256 are tokenized 16 at a time."""
USUAL_NAME = re.compile(r"<[^<>\s]{1,60}>")
"""The form of most control tokens' names. Gemma has 6,000 of this form, which would be too many for one expression."""
_LONGEST_RUN = 4096
"""Characters without, or of nothing but, whitespace: llama.cpp's regex overflows a stack of 8 MB at some 100,000."""


class ControlTokens:
    """The control tokens of a vocabulary, by their names in texts."""

    def __init__(self, names: Iterable[str]) -> None:
        # A name of one character leaves no place for the mark.
        self._names = frozenset(name for name in names if len(name) > 1 and MARK not in name)
        others = sorted((name for name in self._names if not USUAL_NAME.fullmatch(name)), key=len, reverse=True)
        name = "|".join([*map(re.escape, others), USUAL_NAME.pattern])
        self._name, self._beginning = re.compile(name), re.compile(rf"(?=({name}))(.)", re.DOTALL)

    def as_text(self, value: Any) -> Any:  # noqa: ANN401 - any JSON
        """A copy of texts, or of lists and mappings of them, in which a control token's name is only text.

        Its tokens are then those of its letters, see `pieces`. UsageError for more levels than Python can follow.
        """
        try:
            return self._marked(value)
        except RecursionError as error:
            raise UsageError("the messages or tools have too many levels", "send fewer") from error

    def count(self, text: str) -> int:
        """How many tokens the control tokens and marks of a text take at least."""
        return len(self._starts(text)) + text.count(MARK)

    def pieces(self, text: str) -> list[str]:
        """The parts of a text to tokenize one after another: one, unless it has marks or is expensive to tokenize."""
        parts = text.split(MARK)
        if len(text) > _LONGEST_RUN:
            parts = [short for part in parts for short in _without_long_runs(part)]
        return [few for part in parts for few in self._with_few_controls(part)]

    def _marked(self, value: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(value, str):
            return self._beginning.sub(self._mark, value.replace(MARK, "\ufffd"))
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list | tuple) else value

    def _mark(self, match: re.Match[str]) -> str:
        return match[2] + MARK if match[1] in self._names else match[2]

    def _starts(self, text: str) -> list[int]:
        """Where control tokens begin."""
        return [match.start() for match in self._name.finditer(text) if match[0] in self._names]

    def _with_few_controls(self, text: str) -> list[str]:
        if len(text) <= _MAX_AT_ONCE:
            return [text]
        begins = self._starts(text)
        if len(begins) <= _MAX_AT_ONCE:
            return [text]
        cuts = [0, *begins[_AT_ONCE::_AT_ONCE], len(text)]
        return [text[begin:end] for begin, end in pairwise(cuts)]


def _without_long_runs(text: str) -> Iterator[str]:
    """The text, cut within runs of more than `_LONGEST_RUN` characters."""
    begin = 0
    for run in re.finditer(r"\S+|\s+", text):
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]
