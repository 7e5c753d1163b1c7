"""Rows of a task with the corrections in a log: for training, and for the comparison of both adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.answer_log.answers import LoggedAnswer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import first_of, shortened

from edgetune.common.choices import is_complete
from edgetune.curation.checking.answers import misfits
from edgetune.curation.checking.duplicates import same_prompts
from edgetune.curation.checking.findings import CONFLICT, TRAIN, VALIDATION, SplitRow
from edgetune.recipe.model import Recipe
from edgetune.recipe.rows import Rows
from edgetune.tasks import metrics
from edgetune.tasks.data import WEIGHT, TaskRow
from edgetune.tasks.negatives import given, is_made
from edgetune.tasks.plain_prompts import answered_prompts, shared_prompt
from edgetune.tasks.task import Task, read_task

from .corrections import LOG, corrected_rows

MIN_CORRECTIONS = 4
"""Fewest different plain prompts of corrections to learn from: all corrections of some of them are held out."""
_HELD_OUT_PARTS = 4
"""One of so many plain prompts of the corrections is not learned, but only compared."""


class TooFewCorrectionsError(UsageError):
    """An adapter has not enough new corrections to learn from."""


@dataclass(frozen=True)
class LearnedRows:
    """The rows of a task with corrections: those to learn, old validation rows, and corrections that are held out.

    `made` are validation rows that `tasks.negatives` made, which no recipe keeps. `learned` of the rows in `train` are
    corrections. `left_out` corrections have prompts that are kept apart, `unfit` says why others cannot be rows, and
    `contradicted` has the prompts that were corrected in several ways; the last one is learned.
    """

    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    held_out: Sequence[TaskRow]
    learned: int
    made: Sequence[TaskRow] = ()
    left_out: int = 0
    unfit: Sequence[str] = ()
    contradicted: Sequence[str] = ()


def learned_rows(
    task: Task, entries: Sequence[LoggedAnswer], fitting: Callable[[Sequence[TaskRow]], list[TaskRow]] = list
) -> LearnedRows:
    """The rows of `task` with those of its corrected answers; `fitting` are those of some rows that are not too long.

    A correction takes the place of training rows with its prompt, of such answers in training conversations, and of
    earlier corrections of it. Left out are those that rows have already, as after an earlier call with the same log,
    and those whose prompt is that of a row for validation or for the confidence: case and punctuation do not count, and
    neither does the system prompt (see `shared_prompt`). None is held out whose prompt is learned too. Raises one
    UsageError for all corrections that cannot be answers of the task, and TooFewCorrectionsError.
    """
    fit, unfit = corrected_rows(task, entries)
    short = {row.where for row in fitting(fit)}
    unfit += [f"{row.where}: it does not fit in the context" for row in fit if row.where not in short]
    fit = [row for row in fit if row.where in short]
    train, validation = given(task.train), given(task.validation)
    apart = [*validation, *given(task.confidence_rows)]
    prompt_of = shared_prompt(apart, train)
    kept_apart = answered_prompts(apart, prompt_of)
    answers: dict[str, set[str | None]] = {}
    for row in (*train, *apart):
        answers.setdefault(row.prompt_key, set()).add(row.completion)
    corrections: dict[str, dict[str | None, TaskRow]] = {}
    for row in fit:
        same = corrections.setdefault(row.prompt_key, {})
        same.pop(row.completion, None)
        same[row.completion] = row
    rows = {prompt: [*same.values()][-1] for prompt, same in corrections.items()}
    rows = {prompt: row for prompt, row in rows.items() if answers.get(prompt) != {row.completion}}
    corrected = {prompt: row for prompt, row in rows.items() if prompt_of(row) not in kept_apart}
    left_out = len(rows) - len(corrected)
    plain = {prompt: prompt_of(row) for prompt, row in corrected.items()}
    different = len({*plain.values()})
    if different < MIN_CORRECTIONS:
        message = f"the log has {len(rows)} new corrected answers of adapter {task.name!r}"
        if left_out:
            message += f"; {left_out} have prompts for validation or the confidence, which leaves {len(corrected)}"
        if different < len(corrected):
            message += f"; apart from case, punctuation and the system prompt, that leaves {different}"
        message += f", fewer than {MIN_CORRECTIONS}" + (f"; left out: {first_of(unfit)}" if unfit else "")
        remedy = "correct answers to more prompts, or label some with `edgetune learn --ask N`"
        raise TooFewCorrectionsError(message, remedy)
    kept = [_with_corrections(row, corrected) for row in train if row.prompt_key not in corrected]
    # An earlier answer may have made it the prompt of another correction.
    kept = [row for row in kept if row.prompt_key not in corrected]
    # What other rows and conversations have, also in another case, is learned with them.
    known = answered_prompts(kept, prompt_of)
    # A text after a result is learned, with what has its plain prompt.
    known |= {plain[prompt] for prompt, row in corrected.items() if not metrics.is_scorable(row, task.metric)}
    held = {*[text for text in dict.fromkeys(plain.values()) if text not in known][::_HELD_OUT_PARTS]}
    held_out = [row for prompt, row in corrected.items() if plain[prompt] in held]
    learned = [row for prompt, row in corrected.items() if plain[prompt] not in held]
    made = [row for row in task.validation if is_made(row) and row.prompt_key not in corrected]
    several = [row.prompt for prompt, row in corrected.items() if len(corrections[prompt]) > 1]
    return LearnedRows([*kept, *learned], validation, held_out, len(learned), made, left_out, unfit, several)


def compared_rows(task: Task, rows: LearnedRows, again: Recipe) -> list[TaskRow]:
    """The validation rows to compare both adapters on: those that the metric can score.

    Made rows that the build of `again` trains on are left out: it draws others if other adapters have corrections too.
    """
    trained = {row.prompt_key for row in read_task(task.name, again).train} if rows.made else set()
    made = [row for row in rows.made if row.prompt_key not in trained]
    return task.scored([*rows.validation, *made], answered_prompts(rows.train))


def doubts(task: Task, rows: LearnedRows) -> Iterator[str]:
    """What is doubtful about the corrections, a line each.

    That is an answer of another form than the old ones, with a value that none of them has where they have few, or with
    a text that the prompt lacks where most prompts have theirs, and a prompt that another row answers otherwise, where
    only case, punctuation or the system prompt differ.
    """
    if rows.left_out:
        yield f"left out {rows.left_out} corrections of prompts for validation or the confidence: correct those rows"
    yield from (f"left out {reason}" for reason in rows.unfit)
    yield from (f"corrected in several ways, of which the last counts: {text!r}" for text in rows.contradicted)
    old = [row for row in rows.train if not row.where.startswith(LOG)]
    new = [row for row in (*rows.train, *rows.held_out) if row.where.startswith(LOG)]
    if unscored := [row.where for row in new if not metrics.is_scorable(row, task.metric)]:
        reason = f"any text is right after a tool's result with metric {task.metric}"
        yield f"{len(unscored)} corrections, such as {unscored[0]}, are learned, but not compared: {reason}"
    yield from _lone_choices(task, old, new)
    # As training rows, corrections would loosen the form that they are compared with.
    known = [SplitRow(TRAIN, row) for row in old] + [SplitRow(VALIDATION, row) for row in (*rows.validation, *new)]
    prompt_of = shared_prompt(rows.validation, rows.train)
    repeated = same_prompts(known, has_one_answer=task.metric in metrics.EITHER_RIGHT_OR_WRONG, prompt_of=prompt_of)
    for finding in (*misfits(task, known), *(each for each in repeated if each.kind == CONFLICT)):
        if any(where.startswith(LOG) for where in finding.where):
            answers = " | ".join(dict.fromkeys(finding.answers))
            yield shortened(f"{', '.join(finding.where)}: {finding.note}: {finding.prompts[0]!r} → {answers}", 300)


def _lone_choices(task: Task, old: Sequence[TaskRow], new: Sequence[TaskRow]) -> Iterator[str]:
    """The corrections that are none of the choices of the old answers, where these are no choices with them."""
    choices, output = Counter(row.completion or "" for row in old), task.spec.output
    together = choices + Counter(row.completion or "" for row in new)
    if output is not None and output.is_auto and is_complete(choices) and not is_complete(together):
        for row in new:
            if row.completion not in choices:
                yield f"{row.where}: {row.completion!r} is no answer of another row, so all answers become free text"


def source_of(name: str, rows: Sequence[TaskRow]) -> Rows:
    """The rows as data of a recipe, in a form that needs no columns."""
    return Rows.of(name, map(_values, rows))


def _values(row: TaskRow) -> dict[str, Any]:
    if row.messages is None:
        return {"text": row.text, "weight": row.weight}
    turn = row.turn or {"role": "assistant", "content": row.completion}
    tools = {} if row.tools is None else {"tools": row.tools.definitions}
    return {"messages": [*map(dict, row.messages), dict(turn)], **tools, "weight": row.weight}


def _with_corrections(row: TaskRow, corrected: Mapping[str, TaskRow]) -> TaskRow:
    """The row with the corrections in place of earlier answers to their prompts, as these were or have become.

    Calls stay, as their results follow them, and are not learned.
    """
    turns = list(row.turns)
    for place, turn in enumerate(row.turns[:-1]):
        if turn["role"] == "assistant":
            begun = row.with_turns(turns[: place + 1])
            correction = corrected.get(begun.prompt_key)
            if correction is None and begun.turns != row.turns[: place + 1]:
                correction = corrected.get(row.with_turns(row.turns[: place + 1]).prompt_key)
            if correction is not None and correction.completion != begun.completion:
                # One that was not learned is not learned now, as its correction may be held out.
                kept = {WEIGHT: turn[WEIGHT]} if WEIGHT in turn else {}
                turns[place] = {**turn, WEIGHT: 0} if "tool_calls" in turn else {**correction.turns[-1], **kept}
    return row if turns == list(row.turns) else row.with_turns(turns)
