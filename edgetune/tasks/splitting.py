"""Splits the rows of a task into those for training and those for validation, and into folds."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain, pairwise

from edgetune_runtime.errors import UsageError

from edgetune.recipe.parts import Metric

from .data import TaskRow, place_of_row
from .metrics import asked
from .plain_prompts import plain_prompt, without_system


def split(rows: Sequence[TaskRow], held_out: float, seed: int, metric: Metric) -> tuple[list[TaskRow], list[TaskRow]]:
    """Split into training and validation rows, each in the order of `rows`.

    Rows with the same prompt but for case and punctuation stay together, which is that of the last answer that the
    metric compares. So do rows that are beginnings of the same conversation, and rows that differ in the system prompt
    alone, if there are no more of them than are held out. About `held_out` of the rows, and at least one, are for
    validation; the same seed gives the same split. Raises UsageError if all rows have to stay together.
    """
    most = min(max(1, round(held_out * len(rows))), len(rows) - 1)
    groups = _grouped(rows, most, metric)
    if len(groups) < 2:
        prompts = {plain_prompt(asked(row, metric)) for row in rows}
        alike = "with the same prompt" if len(prompts) == 1 else "of one conversation"
        problem = f"{len(rows)} rows {alike}" if len(rows) > 1 else f"only {len(rows)} row"
        raise UsageError(
            f"{problem} cannot be split for validation", "add rows, or set `validation` to a separate file"
        )
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= most:
            chosen.update(group)
    smallest = min(groups, key=len)
    chosen = chosen or set(smallest)
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def halves(rows: Sequence[TaskRow], seed: int, metric: Metric) -> tuple[list[TaskRow], list[TaskRow]]:
    """Two random halves of the rows, in their order, with as many rows of each answer in both as possible.

    Rows stay together as in `split`, but for those of a group of more than half.
    """
    most = len(rows) // 2
    groups = _grouped(rows, most, metric)
    groups = [part for group in groups for part in ([group] if len(group) <= most else [[place] for place in group])]
    random.Random(seed).shuffle(groups)
    groups.sort(key=lambda group: (-len(group), rows[group[0]].completion or ""))
    parts: tuple[list[int], list[int]] = ([], [])
    counts = Counter[tuple[int, str | None]]()
    for group in groups:
        answer = rows[group[0]].completion
        half = min((0, 1), key=lambda half: (counts[half, answer], len(parts[half])))
        parts[half].extend(group)
        counts[half, answer] += len(group)
    one, other = ([rows[place] for place in sorted(part)] for part in parts)
    return one, other


def folds_of(rows: Sequence[TaskRow], count: int, seed: int, metric: Metric) -> list[list[TaskRow]]:
    """The rows in `count` parts of about the same size, which stay together as in `split`. UsageError for too few."""
    groups = _grouped(rows, len(rows) // (2 * count), metric)
    if len(groups) < 2 * count:
        message = f"{len(groups)} different prompts are too few for {count} parts"
        raise UsageError(message, f"give at least {2 * count}, better a few hundred")
    random.Random(seed).shuffle(groups)
    folds: list[list[TaskRow]] = [[] for _ in range(count)]
    for group in groups:
        min(folds, key=len).extend(rows[place] for place in group)
    return folds


def conversations(answers: Sequence[TaskRow]) -> list[str]:
    """For each of these answers of rows, where the row is that has the beginning of its conversation, maybe its own.

    A row goes on with another if it begins with the other's last answer here. No row goes on with one that several go
    on with in different ways, such as a greeting.
    """
    places = [place_of_row(answer.where) for answer in answers]
    lasts = dict(zip(places, answers, strict=True))
    prompts = {place: [*map(plain_prompt, row.beginnings)] for place, row in lasts.items()}
    ends, nexts = dict[str, str](), defaultdict[str, set[str]](set)
    for place, (*_, last) in prompts.items():
        ends.setdefault(last, place)
    for own in prompts.values():
        for prompt, following in pairwise(own):
            nexts[prompt].add(following)
    firsts = {
        place: next((ends[prompt] for prompt in own[:-1] if prompt in ends and len(nexts[prompt]) == 1), place)
        for place, own in prompts.items()
    }
    return [firsts[place] for place in places]


def _grouped(rows: Sequence[TaskRow], most: int, metric: Metric) -> list[list[int]]:
    """The positions of the rows, together where the plain prompt is the same or they begin the same conversation.

    System prompts, which may differ in the date alone, count only among more than `most` rows that are otherwise the
    same: there they may be what the prompt is about. Rows with the same earlier call are together too, where these are
    at most a quarter of `most`: a few large groups would say little about the other rows.
    """
    last = [asked(row, metric) for row in rows]
    groups = _alike([*map(without_system, last)], range(len(rows)))
    groups = [part for group in groups for part in ([group] if len(group) <= most else _alike(last, group))]
    joined: dict[int, list[int]] = {place: group for group in groups for place in group}
    with_call = defaultdict[str, list[int]](list)
    for place, row in enumerate(rows):
        for call in (answer for answer in row.answers[:-1] if answer.turn is not None):
            with_call[plain_prompt(call)].append(place)
    for places in with_call.values():
        parts = {id(group): group for group in (joined[place] for place in places)}.values()
        if len(parts) > 1 and sum(map(len, parts)) <= most // 4:
            whole = [*chain.from_iterable(parts)]
            joined |= dict.fromkeys(whole, whole)
    return [*{id(group): group for group in joined.values()}.values()]


def _alike(rows: Sequence[TaskRow], places: Sequence[int]) -> list[list[int]]:
    """The positions `places` in groups of rows with the same prompt or beginning."""
    own = {place: plain_prompt(rows[place]) for place in places}
    prompts, groups = set(own.values()), dict[str, list[int]]()
    for place, prompt in own.items():
        # The shortest beginning that is a row, the last of which is the row itself.
        earlier = map(plain_prompt, rows[place].beginnings[:-1])
        first = next((beginning for beginning in earlier if beginning in prompts), prompt)
        groups.setdefault(first, []).append(place)
    return list(groups.values())
