"""Writes new rows in the form of a task's training rows, so that they can be appended to these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.recipe.data import Columns, DataSpec
from edgetune.tasks.data import TaskRow, standard_columns
from edgetune.tasks.row_files import entries


@dataclass(frozen=True)
class RowForm:
    """The form of rows: their columns, and whether their completions are JSON values in place of text."""

    columns: Columns
    has_values: bool

    @classmethod
    def of(cls, data: DataSpec, rows: Sequence[TaskRow]) -> RowForm:
        """The form of the first of these training rows; its columns are those that the recipe names, if it does."""
        places = {row.where for row in rows}
        first = next(values for where, values in entries(data.train) if where in places)
        columns = standard_columns(first) if data.columns is None else data.columns
        assert columns is not None
        completion = columns.completion
        return cls(columns, isinstance(completion, str) and isinstance(first.get(completion), dict | list))

    def row(self, system: str | None, prompt: str, answer: str) -> dict[str, Any] | None:
        """The row of a prompt and its answer; None if the completion cannot be made of the answer.

        One with a system prompt is a conversation.
        """
        columns = self.columns
        if columns.messages is not None or system is not None:
            turns = [("system", system), ("user", prompt), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns if content is not None]
            return {columns.messages or "messages": messages}
        assert columns.prompt is not None
        assert columns.completion is not None
        if isinstance(columns.completion, str) and not self.has_values:
            return {columns.prompt: prompt, columns.completion: answer}
        try:
            value = json.loads(answer)
            if isinstance(columns.completion, str):
                return {columns.prompt: prompt, columns.completion: value}
            return {columns.prompt: prompt, **{name: value[name] for name in columns.completion}}
        except (ValueError, RecursionError, LookupError, TypeError):
            return None
