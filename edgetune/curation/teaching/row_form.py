"""Writes new rows in the form of a task's training rows, so that they can be appended to these."""

from __future__ import annotations

import json
from typing import Any

from edgetune.recipe.data import Columns, DataSpec
from edgetune.tasks.data import standard_columns
from edgetune.tasks.row_files import entries


def columns_of(data: DataSpec) -> Columns:
    """The columns that the recipe names, or those of the first training row."""
    if data.columns is not None:
        return data.columns
    _, first = next(entries(data.train))
    columns = standard_columns(first)
    assert columns is not None
    return columns


def row_of(columns: Columns, system: str | None, prompt: str, answer: str) -> dict[str, Any] | None:
    """The row of a prompt and its answer; None if the answer lacks one of the columns that a completion is made of.

    One with a system prompt is a conversation.
    """
    if columns.messages is not None or system is not None:
        turns = [("system", system), ("user", prompt), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns if content is not None]
        return {columns.messages or "messages": messages}
    assert columns.prompt is not None
    assert columns.completion is not None
    if isinstance(columns.completion, str):
        return {columns.prompt: prompt, columns.completion: answer}
    try:
        values = json.loads(answer)
        return {columns.prompt: prompt, **{name: values[name] for name in columns.completion}}
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
