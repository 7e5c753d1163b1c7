"""The output constraint of a task: checked against all rows, or inferred from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.decoding.prompt_texts import FROM_PROMPT
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import first_of

from edgetune.common.progress import Progress
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task

from .infer import infer, problem_of, rejected, spacing_of, unsaid_strings


def output_of_task(task: Task) -> OutputSpec | None:
    """The output constraint of the task's recipe; None if there is none, or `auto` finds none.

    UsageError names rows that break a given constraint or have tools, or all of which break the inferred one.
    """
    option = task.spec.output
    if option is None:
        return None
    _check_rows(task, option.spec)
    return option.spec or _inferred(task)


def write_inferred(name: str, output: OutputSpec | None, folder: Path, progress: Progress) -> None:
    """Report what `auto` inferred for a task, and write it to `folder/NAME.json`."""
    if output is None:
        progress.say(f"{name}: output: auto finds no structure in the completions, so answers are free text")
        return
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    stored = output.to_json()
    path.write_text(json.dumps(stored["schema"] if output.kind == "schema" else stored, indent=2), encoding="utf-8")
    strings = output.text.count(f'"{FROM_PROMPT}": true')
    note = f"; {strings} of its strings must be texts of the prompt" if strings else ""
    progress.say(f"{name}: answers are constrained by the {output.kind} inferred from the rows, see {path}{note}")


def _inferred(task: Task) -> OutputSpec | None:
    """What all answers suggest. Copies of rows would make values look complete, so only those with new ones count."""
    rows, copies = _all_answers((*task.train, *task.validation)), _all_answers([copy.row for copy in task.copies])
    output = _of_rows(rows)
    if output is not None and copies:
        known = set().union(*map(unsaid_strings, rows))
        new = [row for row in copies if not output.accepts(row.completion or "") or not unsaid_strings(row) <= known]
        rows += new
        output = _of_rows(rows) if new else output
    if output is not None:
        _check_spelling(task.name, output, rows)
    return output


def _check_spelling(name: str, output: OutputSpec, rows: Sequence[TaskRow]) -> None:
    """UsageError if all rows break what was inferred from them: JSON may be written in more ways than it allows."""
    if not any(output.accepts(row.completion or "") for row in rows):
        message = f"adapters.{name}.output: auto: all completions are JSON in an unusual form: {_examples(rows)}"
        remedy = "write them as json.dumps(answer, ensure_ascii=False) does, without white space around them"
        raise UsageError(message, f"{remedy}, or leave output out")


def _of_rows(rows: Sequence[TaskRow]) -> OutputSpec | None:
    return infer([row.completion or "" for row in rows], rows)


def _check_rows(task: Task, spec: OutputSpec | None) -> None:
    rows, copies = _all_answers((*task.train, *task.validation)), _all_answers([copy.row for copy in task.copies])
    calling = next((row for row in rows if row.tools is not None), None)
    if calling is not None:
        message = f"adapters.{task.name}.output: {calling.where} has tools, whose schemas constrain the answers"
        raise UsageError(message, "leave output out")
    if spec is None:
        return
    # A copy may say a value in other words than its answer.
    of_copies = [copies[place] for place in rejected(spec, (row.completion or "" for row in copies))]
    wrong = [*(row for row in rows if problem_of(spec, row)), *of_copies]
    if wrong:
        broken, remedy = f"break the {spec.kind}", "correct these rows or the output"
        if not rejected(spec, (row.completion or "" for row in wrong)):
            broken = f"have a text that their prompt lacks, where {FROM_PROMPT} is true"
            remedy = f"correct these rows, or leave {FROM_PROMPT} out"
        elif not rejected(replace(spec, spacing="any"), (row.completion or "" for row in wrong)):
            broken = f"are JSON with another spacing than {spec.spacing}"
            spacing = spacing_of([row.completion or "" for row in (*rows, *copies)])
            remedy = f"set spacing: {spacing}, or write all rows with spacing {spec.spacing}"
        count = len(rows) + len(copies)
        message = f"adapters.{task.name}.output: {len(wrong)} of {count} completions {broken}: {_examples(wrong)}"
        raise UsageError(message, remedy)


def _examples(rows: Sequence[TaskRow]) -> str:
    """Where the first rows are, and how their answers begin."""
    return first_of([f"{row.where} {(row.completion or '')[:60]!r}" for row in rows])


def _all_answers(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The answers of these rows, those before the last turn too, since they are learned as well."""
    return [each for row in rows if row.completion is not None for each in row.answers]
