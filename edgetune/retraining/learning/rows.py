"""Rows of a task with the corrections in a log: for training, and for the comparison of both adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.answer_log.log import LoggedAnswer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import shortened, suggestion

from edgetune.curation.checking.answers import misfits
from edgetune.curation.checking.duplicates import duplicates
from edgetune.curation.checking.findings import CONFLICT, TRAIN, VALIDATION, SplitRow
from edgetune.recipe.rows import Rows
from edgetune.tasks import metrics
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task

MIN_CORRECTIONS = 4
"""Fewest corrections of an adapter to learn from; a part of them is held out."""
_LOG = "log:"
"""Where corrections are from, before the id of their answer."""
_HELD_OUT_PARTS = 4
"""One of so many parts of the corrections is not learned, but only compared."""


class TooFewCorrectionsError(UsageError):
    """An adapter has not enough new corrections to learn from."""


@dataclass(frozen=True)
class LearnedRows:
    """The rows of a task with corrections: those to learn, old validation rows, and corrections that are held out.

    `learned` of the rows in `train` are corrections. `left_out` corrections have prompts that are kept apart.
    """

    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    held_out: Sequence[TaskRow]
    learned: int
    left_out: int = 0


def learned_rows(task: Task, entries: Sequence[LoggedAnswer]) -> LearnedRows:
    """The rows of `task` with those of its corrected answers.

    A correction takes the place of training rows with its prompt, of such answers in training conversations, and of
    earlier corrections of it. Left out are those that rows have already, as after an earlier call with the same log,
    and those whose prompt is that of a row for validation or for the confidence, or follows one of the latter. Raises
    one UsageError for all corrections that cannot be answers of the task, and TooFewCorrectionsError.
    """
    _check(task, entries)
    apart = [*task.validation, *task.confidence_rows]
    kept_apart = {row.prompt_key for row in apart}
    given = {row.prompt_key for row in task.confidence_rows if task.spec.data.confidence is not None}
    answers: dict[str, set[str | None]] = {}
    for row in (*task.train, *apart):
        answers.setdefault(row.prompt_key, set()).add(row.completion)
    rows = {row.prompt_key: row for row in map(_row, entries)}
    rows = {prompt: row for prompt, row in rows.items() if answers.get(prompt) != {row.completion}}
    corrected = {
        prompt: row
        for prompt, row in rows.items()
        if prompt not in kept_apart and given.isdisjoint(answer.prompt_key for answer in row.answers)
    }
    if len(corrected) < MIN_CORRECTIONS:
        message = f"the log has {len(corrected)} corrected answers of adapter {task.name!r} to new prompts"
        remedy = "correct more answers, or label some with --ask N"
        raise TooFewCorrectionsError(f"{message}, fewer than {MIN_CORRECTIONS}", remedy)
    train = task.in_scope(task.train)
    earlier = {answer.prompt_key for row in train for answer in row.answers[:-1]}
    # What conversations have corrected is learned with them.
    held = {*[prompt for prompt in corrected if prompt not in earlier][::_HELD_OUT_PARTS]}
    held_out = [row for prompt, row in corrected.items() if prompt in held]
    learned = [row for prompt, row in corrected.items() if prompt not in held]
    kept = [_with_corrections(row, corrected) for row in train if row.prompt_key not in corrected]
    validation = task.in_scope(task.validation)
    return LearnedRows([*kept, *learned], validation, held_out, len(learned), len(rows) - len(corrected))


def doubts(task: Task, rows: LearnedRows) -> Iterator[str]:
    """What is doubtful about the corrections, a line each.

    That is an answer of another form than the old ones, and a prompt that another row answers otherwise, where only
    case or punctuation differ.
    """
    if rows.left_out:
        yield f"left out {rows.left_out} corrections of prompts for validation or the confidence: correct those rows"
    known = [SplitRow(TRAIN, row) for row in (*rows.train, *rows.held_out)]
    known += [SplitRow(VALIDATION, row) for row in rows.validation]
    repeated = duplicates(known, has_one_answer=task.metric in metrics.EITHER_RIGHT_OR_WRONG)
    for finding in (*misfits(task, known), *(each for each in repeated if each.kind == CONFLICT)):
        if any(where.startswith(_LOG) for where in finding.where):
            answers = " | ".join(dict.fromkeys(finding.answers))
            yield shortened(f"{', '.join(finding.where)}: {finding.note}: {finding.prompts[0]!r} → {answers}", 300)


def values_of(name: str, rows: Sequence[TaskRow]) -> Rows:
    """The rows in a form that needs no columns in a recipe."""
    return Rows.of(name, map(_values, rows))


def _values(row: TaskRow) -> dict[str, Any]:
    if row.messages is None:
        return {"text": row.text, "weight": row.weight}
    turn = row.turn or {"role": "assistant", "content": row.completion}
    tools = {} if row.tools is None else {"tools": row.tools.definitions}
    return {"messages": [*map(dict, row.messages), dict(turn)], **tools, "weight": row.weight}


def _with_corrections(row: TaskRow, corrected: Mapping[str, TaskRow]) -> TaskRow:
    """The row with the corrections in place of earlier answers to their prompts, but for calls: results follow them."""
    turns = list(row.turns)
    for place, turn in enumerate(row.turns[:-1]):
        if turn["role"] == "assistant" and "tool_calls" not in turn:
            correction = corrected.get(row.with_turns(row.turns[: place + 1]).prompt_key)
            if correction is not None:
                turns[place] = {"role": "assistant", "content": correction.completion}
    return row if turns == list(row.turns) else row.with_turns(turns)


def _row(entry: LoggedAnswer) -> TaskRow:
    return TaskRow(f"{_LOG}{entry.id}", entry.messages, entry.correction)


def _check(task: Task, entries: Sequence[LoggedAnswer]) -> None:
    problems = []
    spec = None if task.spec.output is None else task.spec.output.spec
    for entry in entries:
        answer = entry.correction or ""
        asked = shortened(str(entry.messages[-1]["content"]), 60)
        problem = f"answer {entry.id} to {asked!r}: the correction {shortened(answer, 80)!r}"
        try:
            metrics.score(task.metric, [answer], [answer])
        except UsageError:
            problems.append(f"{problem} is no answer that the metric {task.metric} can score; correct it")
        if task.metric == "label" and answer not in task.labels:
            problems.append(f"{problem} is not one of the labels; {suggestion(answer, task.labels)}")
        if spec is not None and not spec.accepts(answer):
            problems.append(f"{problem} breaks the {spec.kind} of the recipe; correct it")
    if problems:
        raise UsageError("\n".join(problems))
