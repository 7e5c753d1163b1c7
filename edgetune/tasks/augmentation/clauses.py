"""Changes the order of the clauses of a prompt together with that of the answer's calls or items."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable

from edgetune.tasks.data import TaskRow

from .slots import SlottedRow

_BETWEEN = re.compile(r"(,? and (?:also )?|; |, )", re.IGNORECASE)
_REFERRING = frozenset((
    "it", "its", "them", "they", "there", "then", "that", "this", "these", "those", "same", "both", "one", "other",
    "first", "after", "before", "afterwards", "finally", "when", "once", "next", "later", "while", "until", "if",
    "again", "another", "instead", "too", "meanwhile", "done", "last",
))  # fmt: skip
"""Words that may refer to another clause, or to an order."""
_INCOMPLETE = frozenset(["the", "a", "an", "my", "our", "in", "on", "at", "to", "of", "all"])
"""Words with which a clause begins that goes on from the one before."""
_SHORTEST = 2
"""Words of a clause."""


def first_words(items: Iterable[SlottedRow]) -> set[str]:
    """The words with which prompts begin."""
    return {word for item in items for word in item.said.lower().split()[:1]}


def reordered(item: SlottedRow, rng: random.Random, openers: Collection[str]) -> TaskRow | None:
    """The row with its clauses in another order; None if its clauses and the parts of its answer are not plain pairs.

    Each value must be in the clause of its part, and each part must have one. Each clause must begin with one of the
    `openers`, or each with a value: others may go on with the verb of the clause before, as in `open the hall blinds,
    attic blinds and close the den blinds`.
    """
    prompt, parts = item.said, item.answer.parts
    pieces = _BETWEEN.split(prompt)
    clauses, between = pieces[::2], pieces[1::2]
    if (
        len(parts) < 2
        or len(item.answer.texts(item.row.turns)) > 1
        or len(clauses) != len(parts)
        or not _are_independent(prompt, clauses)
        or not _are_whole(item, pieces, openers)
        or not _are_pairs(item, pieces)
    ):
        return None
    order = rng.sample(range(len(parts)), len(parts))
    if order == sorted(order):
        order = order[1:] + order[:1]
    mixed = [clauses[order[0]]]
    for text, place in zip(between, order[1:], strict=True):
        mixed += [text, clauses[place]]
    return item.answer.row(item.row, "".join(mixed), [parts[place] for place in order])


def _are_independent(prompt: str, clauses: list[str]) -> bool:
    words = [clause.lower().split() for clause in clauses]
    refers = _REFERRING & set(re.findall(r"\w+", prompt.lower()))
    return not refers and all(len(clause) >= _SHORTEST and clause[0] not in _INCOMPLETE for clause in words)


def _are_whole(item: SlottedRow, pieces: list[str], openers: Collection[str]) -> bool:
    """Whether all clauses begin with a value, or all with an opener and none with a value."""
    starts = [sum(map(len, pieces[:place])) for place in range(0, len(pieces), 2)]
    values = {mention.start for slot in item.slots for mention in slot.mentions}
    return values.issuperset(starts) or (
        values.isdisjoint(starts) and all(clause.lower().split()[0] in openers for clause in pieces[::2])
    )


def _are_pairs(item: SlottedRow, pieces: list[str]) -> bool:
    """Whether the clause of each part has its values, and only these."""
    start, parts = 0, []
    for place, piece in enumerate(pieces):
        end = start + len(piece)
        inside = [slot for slot in item.slots if any(start <= m.start and m.end <= end for m in slot.mentions)]
        if place % 2 == 0:
            parts.append({path[0] for slot in inside for path in slot.paths})
        start = end
    return parts == [{place} for place in range(len(parts))]
