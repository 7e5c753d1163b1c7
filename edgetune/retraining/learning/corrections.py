"""Turns the corrected answers in a log into rows of a task, and refuses corrections that cannot be its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from edgetune_runtime.answer_log.log import LoggedAnswer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Message
from edgetune_runtime.wording import shortened, suggestion

from edgetune.curation.checking.answers import bad_call
from edgetune.tasks import metrics
from edgetune.tasks.data import TaskRow, rows_of
from edgetune.tasks.task import Task

LOG = "log:"
"""Where corrections are from, before the id of their answer."""


def corrected_rows(task: Task, entries: Sequence[LoggedAnswer]) -> tuple[list[TaskRow], list[str]]:
    """The rows of corrected answers, and the reasons why others are left out: their conversations cannot be rows.

    Raises one UsageError for all corrections that cannot be answers of the task.
    """
    rows, left_out, problems = list[TaskRow](), list[str](), list[str]()
    for entry in entries:
        try:
            _row(entry, {"role": "assistant", "content": "any"})
        except UsageError as error:
            left_out.append(error.message)
            continue
        try:
            row = _row(entry, _turn(entry))
            problem = _problem(task, row)
        except UsageError as error:
            problem = f"cannot be an answer: {error.message.removeprefix(f'{LOG}{entry.id}: ')}"
        if problem is None:
            rows.append(row)
            continue
        asked, answer = shortened(str(entry.messages[-1]["content"]), 60), shortened(entry.correction or "", 80)
        problems.append(f"answer {entry.id} to {asked!r}: the correction {answer!r} {problem}")
    if problems:
        raise UsageError("\n".join(problems))
    return rows, left_out


def _row(entry: LoggedAnswer, turn: Message) -> TaskRow:
    """The row of a conversation with this turn as the answer; UsageError if it cannot be one."""
    tools = {} if entry.tools is None else {"tools": list(entry.tools)}
    where = f"{LOG}{entry.id}"
    (row,) = rows_of(where, [(where, {"messages": [*entry.messages, turn], **tools})])
    return row


def _turn(entry: LoggedAnswer) -> Message:
    """The correction as a message, with its calls if it has some and there are tools."""
    text = entry.correction or ""
    value: Any = None
    if entry.tools is not None:
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
    if not isinstance(value, dict) or "tool_calls" not in value:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": value.get("content"), "tool_calls": value["tool_calls"]}


def _problem(task: Task, row: TaskRow) -> str | None:
    """Why the row's answer cannot be one of the task."""
    answer = row.completion or ""
    try:
        metrics.score(task.metric, [answer], [answer])
    except UsageError:
        return f"is no answer that the metric {task.metric} can score; correct it"
    if row.turn is not None:
        broken = bad_call(row)
        return None if broken is None else f"cannot be an answer: {broken}"
    if task.metric == "label" and answer not in task.labels:
        return f"is not one of the labels; {suggestion(answer, task.labels)}"
    spec = None if task.spec.output is None else task.spec.output.spec
    if spec is not None and not spec.accepts(answer):
        return f"breaks the {spec.kind} of the recipe; correct it"
    return None
