"""Writes the training rows of a task without those that a check found useless or harmful, or with weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.atomic import replacing

from edgetune.recipe.data import DataSpec
from edgetune.tasks.data import EARLIER_ANSWER, WEIGHT, place_of_row
from edgetune.tasks.row_files import entries

from .findings import CONFLICT, MISFIT, REPEAT, SHARED, UNUSABLE, WRONG, TaskCheck

STAY = (MISFIT, CONFLICT)
"""Kinds of problems whose rows stay, as only the user knows what is right."""


def write_clean(check: TaskCheck, data: DataSpec, out: Path, *, weighted: bool = False) -> Counter[str]:
    """Write the rows of the training data to `out`, as JSON lines with the same columns.

    Left out are rows that cannot be used, whose answers are probably wrong, whose prompts are in another file too, and
    all but the first of those that repeat, whatever part of the file a build holds out; returns how many, by the kind
    of the problem. If `weighted`, rows with an answer that is probably wrong stay, and their weight is multiplied by
    one below 1. UsageError if no row is left.
    """
    left_out = _left_out(check)
    weights: dict[str, float] = {}
    if weighted and check.estimate is not None:
        left_out = {where: kind for where, kind in left_out.items() if kind != WRONG}
        for row in check.estimate.rows:
            if row.weight < 1:
                where = place_of_row(row.where)
                weights[where] = min(row.weight, weights.get(where, 1.0))
    column = WEIGHT if data.columns is None else data.columns.weight
    counted: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Half a surrogate pair, which UTF-8 does not have, is then written as JSON escapes it.
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for where, values in entries(data.train):
            if where in left_out:
                counted[left_out[where]] += 1
            else:
                if where in weights:
                    own = values.get(column)
                    values[column] = round(weights[where] * (1.0 if own in (None, "") else float(own)), 3)
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        if file.tell() == 0:
            message = f"no row of {data.train} is left for {out}, as all {counted.total()} rows have problems"
            raise UsageError(message, "correct them: `edgetune data check` without --out says what they are")
    return counted


def _left_out(check: TaskCheck) -> dict[str, str]:
    """Where the rows to leave out are, with the kind of the problem."""
    places: dict[str, str] = {}
    for finding in check.findings:
        if finding.kind in (UNUSABLE, WRONG):
            places |= dict.fromkeys(map(place_of_row, finding.where), finding.kind)
        elif finding.kind == SHARED:
            # An earlier turn such as "hello" makes no conversation useless.
            places |= {where: SHARED for where in finding.where if EARLIER_ANSWER not in where}
        elif finding.kind == REPEAT:
            places |= dict.fromkeys(finding.where[1:], REPEAT)
    return places
