"""Finds prompts that repeat, exactly or nearly, in a split or across splits, and those with different answers."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from edgetune.tasks.plain_prompts import plain_prompt

from .findings import CONFLICT, NEAR_REPEAT, NEAR_SHARED, REPEAT, SHARED, Finding, SplitRow

NEAR = 0.75
"""Share of their trigrams that nearly the same prompts have in common."""
_MOST_CHARACTERS = 2000
"""Only this many characters of a longer prompt are compared."""


def duplicates(rows: Sequence[SplitRow], *, has_one_answer: bool) -> Iterator[Finding]:
    """The problems with prompts of these rows; `has_one_answer`: a prompt has only one right answer.

    Prompts are the same if they differ in case, white space and punctuation at the ends of words alone.
    """
    groups = _grouped(rows, prompt_key)
    for same in groups.values():
        if len(same) > 1:
            yield from _of_one_prompt(same, has_one_answer=has_one_answer)
    firsts = [group[0] for group in groups.values()]
    # With one right answer, another value in the prompt makes another answer, so only those with the same are alike.
    for alike in _grouped(firsts, answer_key).values() if has_one_answer else [firsts]:
        for cluster in _clusters(alike):
            if len({item.split for item in cluster}) > 1:
                yield Finding.of(NEAR_SHARED, cluster)
            elif len(set(map(answer_key, cluster))) == 1:
                yield Finding.of(NEAR_REPEAT, cluster)


def conflicts_in_conversations(rows: Sequence[SplitRow], answered: Sequence[SplitRow]) -> Iterator[Finding]:
    """The prompts that have several answers only with those in the middle of conversations, which are in `answered`."""
    last = {item.row.where for item in rows}
    for same in _grouped(answered, prompt_key).values():
        answers = set(map(answer_key, same))
        if len(answers) > 1 and len({answer_key(item) for item in same if item.row.where in last}) < 2:
            yield Finding.of(CONFLICT, same, f"{len(answers)} different answers")


def prompt_key(item: SplitRow) -> str:
    """The prompt of a row, for comparison with others."""
    return plain_prompt(item.row)


def answer_key(item: SplitRow) -> str:
    """The answer of a row, for comparison with others: of JSON, the values."""
    answer = (item.row.completion or "").strip()
    try:
        return json.dumps(json.loads(answer), sort_keys=True)
    except (ValueError, RecursionError):
        return answer


def near(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Positions of texts, each with that of an earlier one that it is nearly the same as, if there is one.

    Two sets of trigrams with the Jaccard similarity NEAR share one of their rarest, so only these are looked up
    (Bayardo et al. 2007, "Scaling up all pairs similarity search").
    """
    trigrams = [{text[i : i + 3] for i in range(max(1, len(text) - 2))} for text in texts]
    counts = Counter(chain.from_iterable(trigrams))
    having: dict[str, list[int]] = defaultdict(list)
    for place, own in enumerate(trigrams):
        rarest = sorted(own, key=lambda gram: (counts[gram], gram))[: len(own) - math.ceil(NEAR * len(own)) + 1]
        candidates = dict.fromkeys(chain.from_iterable(having[gram] for gram in rarest))
        first = next((other for other in candidates if _similarity(own, trigrams[other]) >= NEAR), None)
        if first is not None:
            yield first, place
            continue
        for gram in rarest:
            having[gram].append(place)


def _similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _grouped(rows: Iterable[SplitRow], key: Callable[[SplitRow], str]) -> dict[str, list[SplitRow]]:
    groups: dict[str, list[SplitRow]] = {}
    for item in rows:
        groups.setdefault(key(item), []).append(item)
    return groups


def _of_one_prompt(same: Sequence[SplitRow], *, has_one_answer: bool) -> Iterator[Finding]:
    by_answer = _grouped(same, answer_key)
    if len(by_answer) > 1 and has_one_answer:
        yield Finding.of(CONFLICT, same, f"{len(by_answer)} different answers")
    if len({item.split for item in same}) > 1:
        yield Finding.of(SHARED, same)
    for rows in by_answer.values():
        for repeated in _grouped(rows, lambda item: item.split).values():
            if len(repeated) > 1:
                yield Finding.of(REPEAT, repeated)


def _clusters(rows: Sequence[SplitRow]) -> list[list[SplitRow]]:
    """Rows with nearly the same prompt, each group with the row that the others are compared with first."""
    texts = [prompt_key(item)[:_MOST_CHARACTERS] for item in rows]
    groups: dict[int, list[SplitRow]] = {}
    for first, place in near(texts):
        groups.setdefault(first, [rows[first]]).append(rows[place])
    return list(groups.values())
