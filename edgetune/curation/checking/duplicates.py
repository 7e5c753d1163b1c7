"""Finds prompts that repeat, exactly or nearly, in a split or across splits, and those with different answers."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgetune.recipe.parts import Metric
from edgetune.tasks.data import EARLIER_ANSWER, TaskRow
from edgetune.tasks.metrics import asked, compared_answers
from edgetune.tasks.plain_prompts import plain, plain_prompt, without_system

from .findings import CONFLICT, NEAR_REPEAT, NEAR_SHARED, REPEAT, SHARED, TEST, TRAIN, VALIDATION, Finding, SplitRow

Ints = NDArray[np.int64]
Key = TypeVar("Key", bound=Hashable)

NEAR = 0.75
"""Share of their trigrams, if they are long of their words, that nearly the same prompts have in common."""
_ROUNDING = 1e-6
_NUMBER = re.compile(r"\d+")
_LONG_WORDS = 48
"""Texts of more words are compared by these."""
_MOST_CHARACTERS = 2000
"""Only this many characters of a longer prompt are compared."""


def duplicates(rows: Sequence[SplitRow], metric: Metric, *, has_one_answer: bool) -> Iterator[Finding]:
    """The problems with prompts of these rows; `has_one_answer`: a prompt has only one right answer."""
    groups = _grouped(rows, prompt_key)
    earlier = _grouped(chain(_learned_earlier(rows, metric), _scored_earlier(rows, metric)), prompt_key)
    for key, same in groups.items():
        yield from _of_one_prompt(same, earlier.pop(key, ()), has_one_answer=has_one_answer)
    for turns in earlier.values():
        if len({item.split for item in turns}) > 1:
            yield Finding.of(SHARED, turns)
    firsts = [group[0] for group in groups.values()]
    # With one right answer, another value in the prompt makes another answer, so only those with the same are alike.
    # What comes before the last turn is often the same in all rows, or longer than the turn.
    for alike in _grouped(firsts, lambda item: (_before(item), _answer_of(item) if has_one_answer else None)).values():
        for cluster in _clusters(alike):
            if len({item.split for item in cluster}) > 1:
                yield Finding.of(NEAR_SHARED, cluster)
            elif len(set(map(_answer_of, cluster))) == 1:
                yield Finding.of(NEAR_REPEAT, cluster)
    yield from _under_other_systems(rows, has_one_answer=has_one_answer)


def _learned_earlier(rows: Sequence[SplitRow], metric: Metric) -> Iterator[SplitRow]:
    """The answers before the last one of training conversations; the last that a score compares is where its row is."""
    for item in rows:
        if item.split == TRAIN:
            last = asked(item.row, metric).where
            for turn in item.row.answers[:-1]:
                yield SplitRow(TRAIN, replace(turn, where=item.row.where) if turn.where == last else turn)


def _scored_earlier(rows: Sequence[SplitRow], metric: Metric) -> Iterator[SplitRow]:
    """The answers before the last one that a score of conversations compares: all of a test file, and else the last of
    a row, as a build does not score those before it that are learned."""
    for item in rows:
        if item.split != TRAIN:
            scored = compared_answers(item.row, metric)
            scored = scored if item.split == TEST else scored[-1:]
            yield from (SplitRow(item.split, each) for each in scored if EARLIER_ANSWER in each.where)


def _under_other_systems(rows: Sequence[SplitRow], *, has_one_answer: bool) -> Iterator[Finding]:
    """Rows of several splits whose prompts differ in the words of the system prompt alone.

    As in `split`, the system prompt is what a prompt is about that has more rows than are for validation.
    """
    most = sum(item.split == VALIDATION for item in rows)
    for same in _grouped(rows, lambda item: plain_prompt(without_system(item.row))).values():
        for alike in _grouped(same, lambda item: _answer_of(item) if has_one_answer else None).values():
            is_shared = len({item.split for item in alike}) > 1 and len(set(map(_before, alike))) > 1
            if is_shared and len(same) <= most:
                yield Finding.of(NEAR_SHARED, alike, "the same prompt under another system prompt")


def same_prompts(
    rows: Sequence[SplitRow], *, has_one_answer: bool, prompt_of: Callable[[TaskRow], str] = plain_prompt
) -> Iterator[Finding]:
    """The problems with prompts that are the same by `prompt_of`."""
    for same in _grouped(rows, lambda item: prompt_of(item.row)).values():
        yield from _of_one_prompt(same, has_one_answer=has_one_answer)


def conflicts_in_conversations(rows: Sequence[SplitRow], answered: Sequence[SplitRow]) -> Iterator[Finding]:
    """The prompts that have several answers only with those in the middle of conversations, which are in `answered`."""
    last = {item.row.where for item in rows}
    for same in _grouped(answered, prompt_key).values():
        answers = set(map(_answer_of, same))
        if len(answers) > 1 and len({_answer_of(item) for item in same if item.row.where in last}) < 2:
            yield Finding.of(CONFLICT, same, f"{len(answers)} different answers")


def prompt_key(item: SplitRow) -> str:
    """The prompt of a row, for comparison with others."""
    return plain_prompt(item.row)


def answer_key(answer: str | None) -> str:
    """An answer, for comparison with others: of JSON, the values, where 25.0 is 25."""
    text = (answer or "").strip()
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _answer_of(item: SplitRow) -> str:
    return answer_key(item.row.completion)


def _before(item: SplitRow) -> str:
    """What is before the last turn of a prompt: tools, the system prompt and earlier turns."""
    # The numbers of a system prompt may be the date.
    turns = [
        {**turn, "content": _NUMBER.sub("0", turn["content"])} if turn["role"] == "system" else turn
        for turn in (item.row.messages or ())[:-1]
    ]
    return plain_prompt(replace(item.row, messages=tuple(turns))) if item.row.messages else ""


def near(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Positions of texts, each with that of the first earlier one that it is nearly the same as, if there is one.

    Long texts are compared by their words, as most of them have most trigrams; those of medium length in both ways, so
    that any two of similar length are compared.
    """
    found: dict[int, int] = {}
    words = [text.split() for text in texts]
    numbers: dict[str, int] = defaultdict(lambda: len(numbers))
    trigrams = {place: _trigrams(text) for place, text in enumerate(texts) if len(words[place]) <= _LONG_WORDS}
    long = {
        place: np.array(sorted({numbers[word] for word in own}))
        for place, own in enumerate(words)
        if len(own) > NEAR * _LONG_WORDS
    }
    for sets in (trigrams, long):
        places = [*sets]
        for first, place in _alike([*sets.values()]):
            found[places[place]] = min(places[first], found.get(places[place], len(texts)))
    yield from ((found[place], place) for place in sorted(found))


def _trigrams(text: str) -> Ints:
    """The different trigrams of a text, each as a number."""
    codes = np.frombuffer(text.ljust(3, "\0").encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return np.unique(codes[:-2] << 42 | codes[1:-1] << 21 | codes[2:])


def _alike(sets: Sequence[Ints]) -> Iterator[tuple[int, int]]:
    """Positions of sets, each with that of the first earlier one with at least the Jaccard similarity NEAR.

    Two such sets share some of their rarest features, so only these are looked up (Bayardo et al. 2007, "Scaling up all
    pairs similarity search").
    """
    ranked, having = _by_rarity(sets)
    sizes = np.array([len(own) for own in ranked])
    is_own = np.zeros(len(having), dtype=bool)
    for place, own in enumerate(ranked):
        looked_up = own[: math.floor(len(own) * (1 - NEAR)) + 1 + len(own) // 4]
        found = np.bincount(np.concatenate([having[feature] for feature in looked_up]), minlength=len(sets))[:place]
        least = np.maximum(NEAR * len(own), NEAR / (1 + NEAR) * (sizes[:place] + len(own)))
        is_own[own] = True
        for other in np.flatnonzero(found + len(own) - len(looked_up) >= least - _ROUNDING):
            both = np.count_nonzero(is_own[ranked[other]])
            if both >= NEAR * (len(own) + sizes[other] - both):
                yield int(other), place
                break
        is_own[own] = False


def _by_rarity(sets: Sequence[Ints]) -> tuple[list[Ints], list[Ints]]:
    """The sets with features numbered from the rarest one up, and for each feature the positions of its sets."""
    if not sets:
        return [], []
    sizes = [len(own) for own in sets]
    _, numbers, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    ranks = np.argsort(np.argsort(counts, kind="stable"))[numbers]
    places = np.repeat(np.arange(len(sets)), sizes)[np.argsort(ranks, kind="stable")]
    ranked = [np.sort(own) for own in np.split(ranks, np.cumsum(sizes)[:-1])]
    return ranked, np.split(places, np.cumsum(np.sort(counts))[:-1])


def _grouped(rows: Iterable[SplitRow], key: Callable[[SplitRow], Key]) -> dict[Key, list[SplitRow]]:
    groups: dict[Key, list[SplitRow]] = {}
    for item in rows:
        groups.setdefault(key(item), []).append(item)
    return groups


def _of_one_prompt(
    same: Sequence[SplitRow], earlier: Sequence[SplitRow] = (), *, has_one_answer: bool
) -> Iterator[Finding]:
    """The problems of rows with a prompt, which is also that of `earlier` turns of conversations."""
    by_answer = _grouped(same, _answer_of)
    if len(by_answer) > 1 and has_one_answer:
        yield Finding.of(CONFLICT, same, f"{len(by_answer)} different answers")
    if len({item.split for item in (*earlier, *same)}) > 1:
        yield Finding.of(SHARED, [*earlier, *same])
    for rows in by_answer.values():
        for repeated in _grouped(rows, lambda item: item.split).values():
            if len(repeated) > 1:
                # Clean rows have the first alone, which is the one that is learned most.
                yield Finding.of(REPEAT, sorted(repeated, key=lambda item: -item.row.weight))


def _clusters(rows: Sequence[SplitRow]) -> list[list[SplitRow]]:
    """Rows with nearly the same last turn, each group with the row that all others in it are alike first."""
    texts = [plain(item.row.prompt)[:_MOST_CHARACTERS] for item in rows]
    groups: dict[int, list[SplitRow]] = {}
    for first, place in near(texts):
        groups.setdefault(first, [rows[first]]).append(rows[place])
    return list(groups.values())
