"""Drafts the next tokens from the last answer to a prompt, n-grams of the task's training answers, and the prompt.

Drafting needs no model. The engine verifies a draft in one batch, so a wrong draft costs time and changes an answer by
rounding at most: speculative decoding (Leviathan et al., 2211.17192) with prompt lookup (Saxena, 2023).
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.checked_file import parsing_checked, write_checked

DRAFT_FILE = "draft.bin"
KIND = "edgetune_draft"
LONGEST_CONTEXT = 6
"""Tokens in the longest context of an n-gram."""
LONGEST_DRAFT = 8
LONGEST_REPETITION = 15
"""Tokens of the longest draft from the last answer to the same prompt."""
END = (1 << 32) - 1
"""Entry of a table in place of a token: the answer ends here."""

_MASK = (1 << 64) - 1
_PRIME = 0x9E3779B97F4A7C15
# Per entry: the context's hash, the next token, and the confidence in 255ths.
_ENTRY_BYTES = 8 + 4 + 1
_PRIOR = 2.0
"""Tokens counted as expected and accepted before an answer has verified any draft."""
_REPEATED = 0.98
"""The probability that an answer goes on as the last one to the same prompt, which it equals so far."""
_MAX_POSITIONS = 8
"""Latest positions of a token that are searched."""


@dataclass(frozen=True)
class DraftTable:
    """The n-grams of one task: hashes of their contexts, sorted, the next token of each, and its probability in 255ths.

    `copied` is how often the answer continues like the prompt after 1, 2, ... tokens that both have in common.
    `tokenizer_sha256` is the digest of the tokenizer that the tokens are from.
    """

    tokenizer_sha256: str
    keys: Sequence[int]
    tokens: Sequence[int]
    confidences: Sequence[int]
    copied: tuple[float, ...] = (0.0,) * LONGEST_CONTEXT

    def next(self, context: Sequence[int]) -> tuple[int, float]:
        """The next token after the longest known suffix of `context`, and its probability; (-1, 0) if none is known."""
        for key in reversed(list(context_keys(context))):
            place = bisect_left(self.keys, key)
            if place < len(self.keys) and self.keys[place] == key:
                return self.tokens[place], self.confidences[place] / 255
        return -1, 0.0

    @classmethod
    def of(cls, entries: Mapping[int, tuple[int, float]], copied: Sequence[float], tokenizer_sha256: str) -> DraftTable:
        """A table of {hash of a context: (next token, probability)}."""
        keys = sorted(entries)
        tokens, shares = [entries[key][0] for key in keys], [round(255 * entries[key][1]) for key in keys]
        return cls(tokenizer_sha256, keys, tokens, shares, tuple(copied))


EMPTY = DraftTable("", (), (), ())
"""Drafts nothing."""


def context_keys(context: Sequence[int]) -> Iterator[int]:
    """Hashes of the last token of `context`, the last two, and so on up to `LONGEST_CONTEXT`."""
    key = 0
    for token in reversed(context[-LONGEST_CONTEXT:]):
        key = ((key ^ (token + 1)) * _PRIME) & _MASK
        key ^= key >> 29
        yield key


def write_table(path: Path, table: DraftTable) -> None:
    """Write `draft.bin`; OutOfSpaceError on a full disk."""
    count = len(table.keys)
    parts = (("Q", table.keys), ("I", table.tokens), ("B", table.confidences))
    data = b"".join(struct.pack(f"<{count}{form}", *values) for form, values in parts)
    about = {"tokenizer_sha256": table.tokenizer_sha256, "entries": count, "copied": list(table.copied)}
    write_checked(path, KIND, about, memoryview(data))


def read_table(path: Path, tokenizer_sha256: str, vocabulary: int) -> DraftTable:
    """Read a table that `write_table` wrote, of tokens of a vocabulary of this size.

    Raises VerificationError for a damaged file, IncompatibleError for the table of another tokenizer.
    """
    with parsing_checked(path, KIND, "a draft table") as stored:
        count, copied = int(stored.about["entries"]), tuple(map(float, stored.about["copied"]))
        made_for = str(stored.about["tokenizer_sha256"])
        if count < 0 or len(stored.data) != count * _ENTRY_BYTES or len(copied) != LONGEST_CONTEXT:
            raise ValueError(f"it has {len(stored.data)} bytes for {count} entries")
        keys, tokens = stored.data[: 8 * count].cast("Q"), stored.data[8 * count : 12 * count].cast("I")
        confidences = stored.data[12 * count :]
        if any(vocabulary <= token != END for token in tokens):
            raise ValueError(f"it has tokens outside of the vocabulary of {vocabulary}")
    if made_for != tokenizer_sha256:
        raise IncompatibleError(f"{path} is the draft table of another tokenizer", "build the bundle again")
    return DraftTable(made_for, keys, tokens, confidences, copied)


@dataclass
class Drafter:
    """Drafts for one answer. `tokens` are the prompt's and the answer's so far; `add` appends to them.

    `last` is the last answer to the same prompt, if it is known.
    """

    table: DraftTable
    tokens: list[int] = field(default_factory=list)
    last: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Index the prompt."""
        self._prompt_length = len(self.tokens)
        self._positions: dict[int, list[int]] = {}
        self._hits, self._drafted = 0.0, 0.0
        prompt, self.tokens = self.tokens, []
        self.add(prompt)

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer so far."""
        return self.tokens[self._prompt_length :]

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens of the prompt or the answer."""
        for token in tokens:
            self._positions.setdefault(token, []).append(len(self.tokens))
            self.tokens.append(token)

    def propose(self, limit: int) -> tuple[list[int], list[float]]:
        """A draft of at most `limit` tokens, and for each the probability that it and all before it are right."""
        if self.last and self.answer == self.last[: len(self.answer)]:
            rest = self.last[len(self.answer) :][: min(limit, LONGEST_REPETITION)]
            return list(rest), [self._trust * _REPEATED**count for count in range(1, len(rest) + 1)]
        context, draft, chances = self.tokens[-LONGEST_CONTEXT:], list[int](), list[float]()
        place, chance = self._match(context), self._trust
        for _ in range(min(limit, LONGEST_DRAFT)):
            token, share = self.table.next(context)
            start, length = place
            copied = self.table.copied[length - 1] if length else 0.0
            if copied > share and start < len(self.tokens):
                token, share = self.tokens[start], copied
            if share <= 0 or token == END:
                break
            chance *= share
            follows = length and start < len(self.tokens) and self.tokens[start] == token
            context.append(token)
            draft.append(token)
            chances.append(chance)
            place = (start + 1, min(length + 1, LONGEST_CONTEXT)) if follows else self._match(context)
        return draft, chances

    def repeated(self) -> tuple[int, int]:
        """The token after the longest earlier occurrence of the last tokens, and how many match; 0 for none."""
        place, length = self._match(self.tokens[-LONGEST_CONTEXT:])
        return (self.tokens[place] if length else -1), length

    def learn(self, chances: Sequence[float], accepted: int) -> None:
        """Record that the first `accepted` tokens of a draft with these probabilities were right."""
        self._drafted += sum(chances)
        self._hits += accepted

    @property
    def _trust(self) -> float:
        """How often this answer's drafts were right so far, relative to what was expected."""
        return min(1.0, (_PRIOR + self._hits) / (_PRIOR + self._drafted))

    def _match(self, context: Sequence[int]) -> tuple[int, int]:
        """The position after the longest earlier occurrence of a suffix of `context`, and the suffix's length."""
        best = (0, 0)
        for place in reversed(self._positions.get(context[-1], ())[-_MAX_POSITIONS:] if context else ()):
            length = 1
            while (
                length < min(LONGEST_CONTEXT, len(context), place + 1)
                and self.tokens[place - length] == context[-1 - length]
            ):
                length += 1
            if length > best[1] and place + 1 < len(self.tokens):
                best = (place + 1, length)
        return best
