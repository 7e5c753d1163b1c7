"""A task in, the constraint on its answers out: checked against all rows, or inferred from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import first_of

from edgetune.data import TaskRow
from edgetune.progress import Progress
from edgetune.tasks import Task

from .infer import infer, misfits


def output_of_task(task: Task, folder: Path, progress: Progress) -> OutputSpec | None:
    """The output constraint of the task's recipe; None if there is none, or `auto` finds none.

    What `auto` infers is written to `folder/TASK.json`. UsageError names rows that break a given constraint.
    """
    option = task.spec.output
    if option is None:
        return None
    rows = [row for row in (*task.train, *task.validation) if row.completion is not None]
    if option.spec is not None:
        _check(task.name, option.spec, rows)
        return option.spec
    found = infer([row.completion or "" for row in rows])
    if found is None:
        progress.say(f"{task.name}: output: auto finds no structure in the completions, so answers are free text")
        return None
    path = folder / f"{task.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    stored = found.to_json()
    path.write_text(json.dumps(stored["schema"] if found.kind == "schema" else stored, indent=2), encoding="utf-8")
    progress.say(f"{task.name}: answers are constrained by the {found.kind} inferred from the rows, see {path}")
    return found


def _check(name: str, spec: OutputSpec, rows: Sequence[TaskRow]) -> None:
    wrong = [rows[place] for place in misfits(spec, (row.completion or "" for row in rows))]
    if wrong:
        examples = first_of([f"{row.where} {(row.completion or '')[:60]!r}" for row in wrong])
        message = f"adapters.{name}.output: {len(wrong)} of {len(rows)} completions break the {spec.kind}: {examples}"
        raise UsageError(message, "correct these rows or the output")
