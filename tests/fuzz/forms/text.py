"""Edits of a text in lines, such as a recipe or a template: hostile fragments in place of parts of it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .raw import Edit, byte_edit, with_bytes

_PART = re.compile(r"[\w.-]+|\s+|[^\w\s]+")


class Text:
    """A text; `fragments` are put into it."""

    def __init__(self, fragments: Sequence[str]) -> None:
        self._fragments = fragments

    def edits(self, data: bytes, rng: random.Random) -> list[Edit]:
        """One to three edits: a word, a space or a sign is replaced by a fragment or by another one, or is followed."""
        if rng.random() < 0.1:
            return [byte_edit(len(data), rng)]
        parts = [found.group() for found in _PART.finditer(data.decode())]
        edits = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            new = rng.choice(self._fragments) if rng.random() < 0.7 else rng.choice(parts)
            edits.append([rng.choice(("replace", "replace", "after")), rng.randrange(len(parts)), new])
        return edits

    def applied(self, data: bytes, edits: Sequence[Edit]) -> bytes:
        """The text with the edits."""
        parts = [found.group() for found in _PART.finditer(data.decode())]
        for kind, *rest in edits:
            if kind in ("replace", "after") and rest[0] < len(parts):
                place, new = rest
                parts[place] = new if kind == "replace" else parts[place] + new
        return with_bytes("".join(parts).encode("utf-8", "surrogatepass"), edits)
