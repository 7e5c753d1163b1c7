"""Turns the corrected answers in a log into rows of a task, and refuses corrections that cannot be its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgetune_runtime.answer_log.answers import LoggedAnswer
from edgetune_runtime.answer_log.redaction import REDACTED
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.routing.router import last_user_text
from edgetune_runtime.text.chat import Message
from edgetune_runtime.text.json_text import json_or_none
from edgetune_runtime.wording import shortened, suggestion

from edgetune.building.outputs.infer import SEPARATORS, spacing_of
from edgetune.curation.checking.answers import bad_call
from edgetune.tasks import metrics
from edgetune.tasks.data import WEIGHT, TaskRow, rows_of
from edgetune.tasks.task import Task

LOG = "log:"
"""Where corrections are from, before the id of their answer."""


def corrected_rows(task: Task, entries: Sequence[LoggedAnswer]) -> tuple[list[TaskRow], list[str]]:
    """The rows of corrected answers, and the reasons why others are left out.

    Of a conversation only the corrected answer is learned, as the earlier ones may be wrong. Left out are conversations
    that cannot be rows, and answers that cannot be right, as without what was redacted, or after a mere confirmation.
    Raises one UsageError for all other corrections that cannot be answers of the task.
    """
    rows, left_out, problems = list[TaskRow](), list[str](), list[str]()
    spacing = spacing_of([row.completion or "" for row in task.train])
    for entry in entries:
        try:
            row = _row(task, entry, _turn(entry, spacing))
            problem = _problem(task, row)
        except UsageError as error:
            if (reason := _unfit(task, entry)) is not None:
                left_out.append(reason)
                continue
            problem = f"cannot be an answer: {str(error).removeprefix(f'{LOG}{entry.id}: ')}"
        is_redacted = REDACTED in (entry.correction, last_user_text(list(entry.messages)))
        if is_redacted:
            problem = "was redacted as a whole, or what was asked"
        if problem is None:
            rows.append(row)
            continue
        asked, answer = shortened(str(entry.messages[-1]["content"]), 60), shortened(entry.correction or "", 80)
        problem = f"answer {entry.id} to {asked!r}: the correction {answer!r} {problem}"
        is_mere_confirmation = entry.correction == entry.answer
        is_nobodys_mistake = is_redacted or is_mere_confirmation or REDACTED in (entry.correction or "")
        (left_out if is_nobodys_mistake else problems).append(problem)
    if problems:
        raise UsageError("\n".join(problems))
    return rows, left_out


def _row(task: Task, entry: LoggedAnswer, turn: Message) -> TaskRow:
    """The row of a conversation with this turn as the answer; UsageError if it cannot be one.

    The task's own system prompt is left out, as its rows do not have it.
    """
    tools = {} if entry.tools is None else {"tools": list(entry.tools)}
    where = f"{LOG}{entry.id}"
    has_own = entry.messages[0] == {"role": "system", "content": task.spec.system}
    talk = entry.messages[has_own:]
    before = [{**each, WEIGHT: 0} if each["role"] == "assistant" else each for each in talk]
    (row,) = rows_of(where, [(where, {"messages": [*before, turn], **tools})])
    return row


def _unfit(task: Task, entry: LoggedAnswer) -> str | None:
    """Why the conversation can be no row, whatever its answer."""
    try:
        _row(task, entry, {"role": "assistant", "content": "any"})
    except UsageError as error:
        return error.message
    return None


def _turn(entry: LoggedAnswer, spacing: str) -> Message:
    """The correction as a message; JSON with this spacing, as the training rows have it."""
    turn = entry.message_of(entry.correction or "")
    value = json_or_none(turn["content"])
    if spacing not in SEPARATORS or not isinstance(value, dict | list):
        return turn
    return {**turn, "content": json.dumps(value, ensure_ascii=False, separators=SEPARATORS[spacing])}


def _problem(task: Task, row: TaskRow) -> str | None:
    """Why the row's answer cannot be one of the task."""
    answer = row.completion or ""
    try:
        metrics.score(task.metric, [answer], [answer], offers_tools=[row.tools is not None])
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
