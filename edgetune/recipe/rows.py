"""Rows given in Python in place of a file, kept as one line of JSON per row."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

from edgetune_runtime.errors import UsageError

from .problems import Loc, shown

MAX_ROWS, MAX_BYTES = 1_000_000, 1_000_000_000
_DATA_KEYS = ("train", "validation", "confidence")
_REMEDY = "give a file, a hub id, or rows: a list or iterator of mappings, a pandas DataFrame or a datasets.Dataset"


@dataclass(frozen=True)
class Rows:
    """Rows from memory; `name` is where they were given, such as `adapters.command.data.train`, for messages."""

    name: str
    lines: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, name: str, rows: object) -> Rows:
        """Read all rows: mappings in any iterable, a pandas DataFrame (missing values become null), or a Dataset.

        Raises UsageError for a row, counted from 1, that is not a mapping of JSON values or whose reading raises an
        error, and for more than MAX_ROWS rows or MAX_BYTES.
        """
        lines, size = list[str](), 0
        for number, row in enumerate(_mappings(name, rows), 1):
            try:
                line = json.dumps(row, default=_json_value)
            except (TypeError, ValueError, RecursionError) as error:
                message = f"{name} row {number} is not JSON: {error}"
                raise UsageError(message, "use texts, numbers, lists and mappings") from error
            size += len(line)
            if number > MAX_ROWS or size > MAX_BYTES:
                message = f"{name} has more than {MAX_ROWS:,} rows or {MAX_BYTES // 10**6:,} MB"
                raise UsageError(message, "write them to a .jsonl file and give its path")
            lines.append(line)
        return cls(name, tuple(lines))

    def __str__(self) -> str:
        return self.name

    @property
    def text(self) -> str:
        """The contents of a JSONL file with the rows."""
        return "".join(f"{line}\n" for line in self.lines)

    @cached_property
    def summary(self) -> str:
        """What a manifest has in place of the name of a file."""
        return f"{len(self.lines)} rows from memory, sha256 {hashlib.sha256(self.text.encode()).hexdigest()[:12]}"


def plain_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe written in Python, with plain values, and `Rows` where it has rows."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{shown(values)} is not a recipe", "give a Recipe, the path of a recipe file, or a mapping")
    try:
        copied: dict[str, Any] = _copied(values, ())
    except RecursionError as error:
        raise UsageError("the recipe is nested too deeply", "see docs/recipe.md for its keys") from error
    return copied


def _copied(value: Any, loc: Loc) -> Any:  # noqa: ANN401 - any value of a recipe
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if loc[-2:-1] == ("data",) and loc[-1] in _DATA_KEYS and value is not None and not isinstance(value, str | Rows):
        return Rows.of(".".join(map(str, loc)), value)
    if isinstance(value, Mapping):
        return {key: _copied(item, (*loc, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, (*loc, number)) for number, item in enumerate(value)]
    return value


def with_label_names(dataset: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - datasets carries no types
    """The rows of a datasets.Dataset, with the names of labels in place of their numbers."""
    features = dataset.features or {}
    labels = {column: feature.int2str for column, feature in features.items() if hasattr(feature, "int2str")}
    for row in dataset:
        yield {column: _named(value, labels.get(column)) for column, value in row.items()}


def _named(value: object, name_of: Callable[[int], str] | None) -> object:
    """The name of a label's number; None for numbers below 0, which mean no label."""
    if name_of is None or not isinstance(value, int):
        return value
    return name_of(value) if value >= 0 else None


def _mappings(name: str, rows: object) -> Iterator[dict[str, Any]]:
    iterator = iter(_records(name, rows))
    for number in count(1):
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # an iterator of the user may raise anything
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            message = f"{name} row {number} cannot be read: the iterator raised {reason}"
            raise UsageError(message, "correct it and give the rows again") from error
        if not isinstance(row, Mapping):
            raise UsageError(f"{name} row {number} is {shown(row)}, not a mapping", _REMEDY)
        yield dict(row)


def _records(name: str, rows: object) -> Iterable[object]:
    if isinstance(rows, Mapping) and any(hasattr(split, "features") for split in rows.values()):
        raise UsageError(f"{name} is a dataset with splits, not rows", f"give one of them: {', '.join(map(str, rows))}")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise UsageError(f"{name} is {shown(rows)}, not rows", _REMEDY)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        if not rows.columns.is_unique:
            twice = rows.columns[rows.columns.duplicated()][0]
            raise UsageError(f"{name} has two columns {shown(twice)}", "rename or drop one")
        records: list[object] = rows.astype(object).where(rows.notna(), None).to_dict("records")
        return records
    return with_label_names(rows) if hasattr(rows, "features") else rows


def _json_value(value: object) -> object:
    """The numbers and lists of numpy as those of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it has a value of type {type(value).__name__}")
