"""Makes changed copies of rows for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edgetune.recipe.data import AugmentSpec
from edgetune.tasks.augmentation.copies import ChangedRow, copies_of
from edgetune.tasks.data import TaskRow, rows_of

QUIET = {"noise": 0}


def rows_from(values: list[dict[str, Any]]) -> list[TaskRow]:
    return rows_of("rows", [(f"row {number}", row) for number, row in enumerate(values, 1)])


def copied(
    rows: list[dict[str, Any]],
    schema: dict[str, Any] | None = None,
    foreign: Sequence[str] = (),
    labels: Sequence[str] = (),
    **options: object,
) -> list[ChangedRow]:
    """The copies of these rows, without validation rows."""
    spec, given = AugmentSpec.model_validate(options), rows_from(rows)
    return copies_of(given, spec, schema=schema, labels=labels, validation=[], foreign=foreign, seed=0)


def pairs(changed: list[ChangedRow]) -> list[tuple[str, Any]]:
    """Prompt and answer of each copy; JSON as values."""
    return [(str((c.row.messages or ())[-1]["content"]), _value(c.row.completion or "")) for c in changed]


def _value(text: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(text)
    except ValueError:
        return text
