"""Makes texts that are of no task: requests to an assistant, rows of other tasks, and texts with shuffled letters."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count, islice, zip_longest
from pathlib import Path

from edgetune_runtime.inference.routing.router import last_user_text

from .data import TaskRow
from .plain_prompts import plain

GENERAL_REQUESTS = Path(__file__).with_name("general_requests.txt").read_text(encoding="utf-8").splitlines()
"""What people ask an assistant, written for edgetune: prompts of no task."""
MADE = "made"
"""Where rows are from that this module makes."""
_SHARE_SCRAMBLED, _SHORTEST_SCRAMBLED = 0.7, 4
_SHARE = 0.5
_MIN_JUDGED = 30
"""Of these, enough are found for a confidence of the answer that a text is out of scope."""
_PARTS = 4
"""One of so many parts of general requests, and of other tasks' texts, is for validation."""


def scrambled(prompts: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Prompts that keep the form and the short words of the tasks' ones: the letters of most others are shuffled."""

    def word(text: str) -> str:
        shuffles = len(text) >= _SHORTEST_SCRAMBLED and rng.random() < _SHARE_SCRAMBLED
        return "".join(rng.sample(text, len(text))) if shuffles else text

    return [" ".join(map(word, prompt.split(" "))) for prompt in rng.sample(prompts, min(count, len(prompts)))]


def mixed(rows: Sequence[TaskRow], rng: random.Random) -> list[str]:
    """Texts that begin as one prompt and end as one with another label, which has few of its words."""
    parts = [(_text_of(row).split(), row.completion) for row in rows]
    pairs = zip(parts, rng.sample(parts, len(parts)), strict=True)
    return [
        " ".join((*one[: (len(one) + 1) // 2], *other[len(other) // 2 :]))
        for (one, label), (other, another) in pairs
        if label != another and 2 * len({*one} & {*other}) < min(len(one), len(other))
    ]


def negative_rows(
    train: Sequence[TaskRow],
    validation: Sequence[TaskRow],
    others: Mapping[str, Sequence[TaskRow]],
    label: str,
    seed: int,
    *,
    excluded: Sequence[TaskRow],
) -> tuple[list[TaskRow], list[TaskRow]]:
    """Texts of none of the labels of a task, as rows with this `label`: up to half as many as it has rows of each kind,
    and at least 30 for validation.

    General requests, its own rows with shuffled letters, and the `foreign_texts` of each other task take turns. Those
    for validation are made of other texts, and do not depend on the training rows; `mixed` ones are among them, without
    which labels of texts that are near the task would seem too sure. The texts of `excluded` are its own ones too.
    """
    rng, parts = random.Random(seed), [list(dict.fromkeys(map(_text_of, rows))) for rows in (validation, train)]
    own_rows = [*validation, *train, *excluded]
    kinds = [rng.sample(texts, len(texts)) for texts in (GENERAL_REQUESTS, *foreign_texts(others.values(), own_rows))]
    known = _plain_texts(own_rows)
    made: list[list[str]] = []
    for place, (own, rows) in enumerate(zip(parts, (validation, train), strict=True)):
        texts = [kind[len(kind) // _PARTS :] if place else kind[: len(kind) // _PARTS] for kind in kinds]
        near = [] if place else [mixed(rows, rng)]
        turns = chain.from_iterable(zip_longest(scrambled(own, len(own), rng), *near, *texts))
        new = dict.fromkeys(text for text in turns if text and plain(text) not in known)
        made.append(list(islice(new, max(0 if place else _MIN_JUDGED, round(len(rows) * _SHARE)))))
        known |= {*map(plain, made[-1])}
    numbers = count(1)
    judged, learned = ([_row(next(numbers), text, label) for text in texts] for texts in made)
    return learned, judged


def foreign_texts(others: Iterable[Sequence[TaskRow]], own: Sequence[TaskRow]) -> list[list[str]]:
    """The different texts of each other task.

    One that has a text in common with a task's `own` rows, but for case and punctuation, is left out: what it is asked
    is in the scope of both.
    """
    known = _plain_texts(own)
    return [[*dict.fromkeys(map(_text_of, rows))] for rows in others if known.isdisjoint(_plain_texts(rows))]


def given(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows that this module has not made."""
    return [row for row in rows if not is_made(row)]


def is_made(row: TaskRow) -> bool:
    """Whether this module has made the row."""
    return row.where.startswith(f"{MADE}:")


def letters_of(row: TaskRow) -> str:
    """The text of a row with the letters of each word in order: the same for one that is `scrambled`."""
    return " ".join("".join(sorted(word)) for word in _text_of(row).split(" "))


def _row(number: int, text: str, label: str) -> TaskRow:
    return TaskRow(f"{MADE}:{number}", ({"role": "user", "content": text},), label, is_labelled=True)


def _plain_texts(rows: Sequence[TaskRow]) -> set[str]:
    return {plain(_text_of(row)) for row in rows}


def _text_of(row: TaskRow) -> str:
    return last_user_text(list(row.messages)) if row.messages else row.text or ""
