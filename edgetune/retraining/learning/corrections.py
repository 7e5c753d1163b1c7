"""Turns the corrected answers in a log into rows of a task, and refuses corrections that cannot be its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgetune_runtime.answer_log.answers import LoggedAnswer
from edgetune_runtime.answer_log.redaction import REDACTED
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.routing.router import last_user_text
from edgetune_runtime.text.chat import Message
from edgetune_runtime.text.json_text import json_or_none
from edgetune_runtime.tools.formats import SEPARATORS
from edgetune_runtime.wording import shortened, suggestion

from edgetune.building.outputs.infer import problem_of, spacing_of
from edgetune.curation.checking.answers import bad_call
from edgetune.recipe.parts import Metric
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
    output = None if task.spec.output is None else task.spec.output.spec
    answers = [row.completion or "" for row in task.train if row.tools is None]
    are_objects = bool(answers) and all(isinstance(json_or_none(answer), dict | list) for answer in answers)
    for entry in entries:
        try:
            row = row_of(entry, _turn(task, entry, spacing), task.spec.system)
            problem = problem_with(row, task.metric, task.labels, output, are_objects=are_objects)
        except UsageError as error:
            if (reason := unfit(entry)) is not None:
                left_out.append(reason)
                continue
            problem = f"cannot be an answer: {str(error).removeprefix(f'{LOG}{entry.id}: ')}"
        is_redacted = entry.correction == REDACTED or is_redacted_as_a_whole(entry)
        if is_redacted:
            problem = "was redacted as a whole, or what was asked"
        has_redacted = REDACTED in (entry.correction or "")
        if problem is None and has_redacted and REDACTED not in json.dumps(entry.messages):
            problem = "has a redacted value that no message has"
        if problem is None:
            rows.append(row)
            continue
        asked, answer = shortened(str(entry.messages[-1]["content"]), 60), shortened(entry.correction or "", 80)
        problem = f"answer {entry.id} to {asked!r}: the correction {answer!r} {problem}"
        is_mere_confirmation = entry.correction == entry.answer
        is_nobodys_mistake = is_redacted or is_mere_confirmation or has_redacted
        (left_out if is_nobodys_mistake else problems).append(problem)
    if problems:
        raise UsageError("\n".join(problems), "answer them again: `edgetune learn --ask N` asks about them too")
    return rows, left_out


def row_of(entry: LoggedAnswer, turn: Message, system: str | None) -> TaskRow:
    """The row of a conversation with this turn as the answer; UsageError if it cannot be one.

    The task's own `system` prompt is left out, as its rows do not have it.
    """
    tools = {} if entry.tools is None else {"tools": list(entry.tools)}
    where = f"{LOG}{entry.id}"
    has_own = entry.messages[0] == {"role": "system", "content": system}
    talk = entry.messages[has_own:]
    before = [{**each, WEIGHT: 0} if each["role"] == "assistant" else each for each in talk]
    (row,) = rows_of(where, [(where, {"messages": [*before, turn], **tools})])
    return row


def is_redacted_as_a_whole(entry: LoggedAnswer) -> bool:
    """Whether nothing is left of what was asked, so that no answer to it can be learned."""
    return last_user_text(list(entry.messages)) == REDACTED


def unfit(entry: LoggedAnswer) -> str | None:
    """Why the conversation cannot be a row, whatever its answer."""
    try:
        row_of(entry, {"role": "assistant", "content": "any"}, None)
    except UsageError as error:
        return error.message
    return None


def _turn(task: Task, entry: LoggedAnswer, spacing: str) -> Message:
    """The correction as a message; JSON with this spacing, as the training rows have it, and no spaces at a label."""
    text = entry.correction or ""
    turn = entry.message_of(text.strip() if task.metric == "label" else text)
    value = json_or_none(turn["content"])
    if not isinstance(value, dict | list):
        return turn
    if spacing not in SEPARATORS:
        return {**turn, "content": turn["content"].strip()}
    return {**turn, "content": json.dumps(value, ensure_ascii=False, separators=SEPARATORS[spacing])}


def problem_with(
    row: TaskRow, metric: Metric, labels: Sequence[str], output: OutputSpec | None, *, are_objects: bool
) -> str | None:
    """Why the row's answer cannot be one with this metric, these labels and this constraint of the recipe.

    If all others `are_objects` or lists, another value would make all answers free text.
    """
    answer = row.completion or ""
    try:
        metrics.score(metric, [answer], [answer], offers_tools=[row.tools is not None])
    except UsageError:
        return f"is not an answer that the metric {metric} can score"
    if row.turn is not None:
        broken = bad_call(row)
        return None if broken is None else f"cannot be an answer: {broken}"
    if are_objects and row.tools is None and not isinstance(json_or_none(answer), dict | list):
        return "is no JSON object or list, as all other answers are"
    if metric == "label" and answer.strip() not in labels:
        return f"is not one of the labels; {suggestion(answer, labels)}"
    return None if output is None else problem_of(output, row)
