"""Finds the columns of a data file that are the prompt and the answer, by their names and their values."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.wording import first_of

from edgetune.tasks.data import WEIGHT, standard_columns
from edgetune.tasks.row_files import DELIMITERS

# Names that data sets use, the most specific first.
_PROMPTS = (
    "prompt", "text", "question", "input", "query", "utterance", "sentence", "message", "user", "request",
    "instruction", "source", "content", "review", "comment", "email", "title", "body",
)  # fmt: skip
_LABELS = ("label", "intent", "category", "class", "topic", "sentiment", "tag", "kind", "type")
_ANSWERS = (
    "completion", *_LABELS[:1], "answer", "output", "response", "reply", "target", "assistant", *_LABELS[1:],
    "command", "call", "summary", "translation", "expected", "result",
)  # fmt: skip
_GENERIC = ("completion", "label", "answer", "output", "response", "target", "assistant", "expected", "result", "class")
# Columns that are parts of one prompt.
_BOTH = {"instruction", "input"}
_TOOLS = ("tools", "functions")
_SYSTEM = ("system", "system_prompt", "instruction")
# Columns about the rows, which are neither prompt nor answer.
_OTHERS = ("id", "index", "idx", "uuid", "key", "no", "number", "split", "fold", "timestamp", "created", "url")
# Columns that may be about the rows too, but are the answer if there is no other.
_TIMES = ("date", "time")
ADD_HEADER = "add a header such as text,label, or rename that column"
"""What to do about a table whose first line is a row."""
_SHORT_CHARACTERS = 40
"""Mean length of values that may be parts of one answer."""


@dataclass(frozen=True)
class RowForm:
    """Where the rows of a file have their parts: `columns` as in a recipe, None for a standard form, and why.

    `system` is the value of a column that is the same in all rows, `noun` what the answers are called, or "";
    `is_label` if that is a word for labels.
    """

    columns: Mapping[str, Any] | None
    reason: str
    system: str | None = None
    noun: str = ""
    is_label: bool = False


@dataclass(frozen=True)
class _Column:
    """A column with its values that are not empty; `is_in_all` if each row has it, also with an empty value."""

    name: str
    values: Sequence[Any]
    rows: int
    is_in_all: bool

    @property
    def parts(self) -> list[str]:
        """The words of its name: `user_text` and `userText` have two."""
        return re.findall(r"[^\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", self.name).lower())

    @cached_property
    def texts(self) -> list[str]:
        return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in self.values]

    @property
    def is_sparse(self) -> bool:
        """Whether fewer than half of the rows fill it."""
        return len(self.values) * 2 < self.rows

    @cached_property
    def distinct(self) -> int:
        return len(set(self.texts))

    @property
    def is_text(self) -> bool:
        """Whether most of its values are texts and not numbers."""
        numbers = sum(not isinstance(value, str) or _is_number(value) for value in self.values)
        return numbers * 2 < len(self.values)

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.texts)) / max(len(self.values), 1)

    @property
    def is_constant(self) -> bool:
        return self.distinct == 1 and len(self.values) > 1

    @property
    def is_key(self) -> bool:
        """Whether its name or a sequence of whole numbers says that it identifies the rows."""
        first = self.texts[0]
        is_sequence = first.isdecimal() and self.texts == [str(int(first) + n) for n in range(len(self.texts))]
        return is_sequence or self.is_named(_OTHERS) or self.name.lower().endswith("id")

    def is_named(self, names: Sequence[str]) -> bool:
        """Whether its name ends with one of these words."""
        return bool(self.parts) and self.parts[-1] in names

    def rank(self, names: Sequence[str]) -> int | None:
        """Its place among these names: those of the whole name first, then those of its last word."""
        whole, last = self.name.strip().lower(), (self.parts or [""])[-1]
        if whole in names:
            return names.index(whole)
        return len(names) + names.index(last) if last in names else None

    def __str__(self) -> str:
        return f"{self.name} ({f'{self.distinct:,} values' if self.distinct > 1 else 'one value'})"


def form_of(path: Path, values: Sequence[Mapping[str, Any]]) -> RowForm:
    """The form of the rows with these values; UsageError with the columns there are if none fits."""
    columns = _columns_of(path, values)
    conversation = next((column for column in columns if not column.is_sparse and _holds_messages(path, column)), None)
    if conversation is not None:
        return _conversation(conversation, columns)
    candidates = [column for column in columns if not (column.is_sparse or _is_other(column))]
    prompt = _prompt_of(candidates)
    if prompt is None:
        raise UsageError(
            f"{path} has no usable columns; there are: {first_of(list(map(str, columns)), 20, ', ')}",
            "give a column of different texts, called text, or prompt with a column completion",
        )
    others = [column for column in columns if column is not prompt]
    _check_parts(path, prompt, others)
    answers, how = _answers_of([column for column in candidates if column is not prompt] or _last_resort(others))
    system, left = _system_and_left([column for column in others if column not in answers])
    if not answers:
        reason = f"{prompt.name} is the only column of text, so all of it is learned{left}"
        # Only the reason for columns in the recipe says which are not used.
        return RowForm(None if prompt.name == "text" and not left else {"text": prompt.name}, reason)
    if path.suffix.lower() in DELIMITERS:
        _check_header(path, prompt, answers)
    names = [column.name for column in answers]
    answer = names[0] if len(names) == 1 else names
    why = "its name" if prompt.rank(_PROMPTS) is not None else "its texts, which differ most"
    reason = f"{prompt.name} is the prompt by {why}, and {' and '.join(names)} the answer{how}{left}"
    standard = standard_columns({str(name) for row in values for name in row})
    is_standard = standard is not None and (prompt.name, answer) == (standard.prompt, standard.completion)
    mapped = None if is_standard else {"prompt": prompt.name, "completion": answer}
    return RowForm(
        mapped,
        reason,
        system,
        _noun(answers),
        len(answers) == 1 and answers[0].rank(_LABELS) is not None,
    )


def _check_header(path: Path, prompt: _Column, answers: Sequence[_Column]) -> None:
    """UsageError for a table whose header seems to be a row."""
    found = next((column.name for column in answers if seems_a_row(prompt.name, column.name, column.texts)), None)
    if found is not None:
        message = f"the first line of {path} looks like a row, because {found!r} is also an answer in other rows"
        raise UsageError(message, ADD_HEADER)


def seems_a_row(prompt: str, answer: str, answers: Collection[str]) -> bool:
    """Whether a table's header with these columns seems to be a row: that of the answer is called like one of them."""
    # Known names are a header: a column `spam` beside `text` may have the values spam and ham.
    return answer in answers and prompt.lower() not in _PROMPTS and answer.lower() not in _ANSWERS


def _check_parts(path: Path, prompt: _Column, others: Sequence[_Column]) -> None:
    """UsageError if rows have different inputs beside their instructions, or the reverse."""
    part = next((column for column in others if {prompt.name.lower(), column.name.lower()} == _BOTH), None)
    if part is not None and (part.is_sparse or part.distinct > 1):
        message = f"{len(part.values)} of {part.rows} rows of {path} have {part.name!r} beside {prompt.name!r}"
        remedy = "write both into one column, prompt, or remove the one on which no answer depends"
        raise UsageError(message, remedy)


def _columns_of(path: Path, values: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """The columns with a name, in their order; UsageError if there are none that half of the rows fill.

    Without the rows' weights, which training reads by their name.
    """
    filled: dict[str, list[Any]] = {}
    for row in values:
        for name, value in row.items():
            is_empty = value in (None, []) or (isinstance(value, str) and not value.strip())
            if name not in ("", WEIGHT) and not is_empty:
                filled.setdefault(str(name), []).append(value)
    columns = [_Column(name, cells, len(values), all(name in row for row in values)) for name, cells in filled.items()]
    if all(column.is_sparse for column in columns):
        names = first_of(list(filled), 20, ", ") or "none"
        message = f"{path} has no column that half of its rows fill; there are: {names}"
        raise UsageError(message, "write all rows in one form, such as text and label")
    return columns


def _holds_messages(path: Path, column: _Column) -> bool:
    """Whether a column has conversations; UsageError for the form with `from` and `value`."""
    first = column.values[0]
    if isinstance(first, str) and first.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            first = json.loads(first)
    if not isinstance(first, list) or not first or not isinstance(first[0], dict):
        return False
    if {"from", "value"} <= first[0].keys():
        message = f"{path}: {column.name!r} has messages of from and value"
        raise UsageError(message, 'write them as {"role": "user" or "assistant", "content": …}')
    return "role" in first[0]


def _conversation(column: _Column, columns: Sequence[_Column]) -> RowForm:
    tools = next((other.name for other in columns if other.name.lower() in _TOOLS), None)
    system, left = _system_and_left([other for other in columns if other.name not in (column.name, tools)])
    reason = f"{column.name} has conversations, whose last message is the answer"
    reason += (f", and {tools} their tools" if tools else "") + left
    if column.name == "messages" and tools in (None, "tools"):
        return RowForm(None, reason, system)
    return RowForm({"messages": column.name, **({"tools": tools} if tools else {})}, reason, system)


def _system_and_left(columns: Sequence[_Column]) -> tuple[str | None, str]:
    """The system prompt in columns that are neither prompt nor answer, and the end of a reason, on the others."""
    full = [column for column in columns if not column.is_sparse]
    system = next((column for column in full if column.is_constant and column.rank(_SYSTEM) is not None), None)
    left = [
        column.name + f" ({len(column.values)} of {column.rows} rows)" * column.is_sparse
        for column in columns
        if column is not system
    ]
    return system.texts[0] if system else None, f"; not used: {first_of(left, 8, ', ')}" if left else ""


def _is_other(column: _Column) -> bool:
    """Whether a column numbers or dates the rows, or says the same in all of them."""
    if column.rank(_ANSWERS) is not None:
        return False
    counts = not column.is_text and column.distinct == column.rows
    return column.is_named((*_OTHERS, *_TIMES)) or column.is_constant or counts


def _last_resort(columns: Sequence[_Column]) -> list[_Column]:
    """The only column of times or of numbers that are not those of the rows; none if there are several."""
    left = [column for column in columns if not (column.is_sparse or column.is_constant or column.is_key)]
    return left if len(left) == 1 else []


def _prompt_of(columns: Sequence[_Column]) -> _Column | None:
    """The column of the prompt: by name, then the one with the most and longest different texts."""
    texts = [column for column in columns if column.is_text]
    # Of `instruction` and `input`, the one that is never empty and says more.
    whole = [column for column in texts if len(column.values) == column.rows] or texts
    most = max((column.distinct for column in whole), default=0)
    named = [column for column in whole if column.rank(_PROMPTS) is not None and column.distinct * 2 >= most]
    if named:
        return min(named, key=lambda column: column.rank(_PROMPTS) or 0)
    free = [column for column in texts if column.rank(_ANSWERS) is None]
    return max(free, key=lambda column: (column.distinct, column.mean_length), default=None)


def _answers_of(columns: Sequence[_Column]) -> tuple[list[_Column], str]:
    """The columns of the answer, and how they were chosen."""
    named = [column for column in columns if column.rank(_ANSWERS) is not None]
    if named:
        return [min(named, key=lambda column: column.rank(_ANSWERS) or 0)], " by its name"
    # What a prompt is called may be part of the prompt, but no answer.
    left = [column for column in columns if column.rank(_PROMPTS) is None]
    if len(left) < 2:
        return left, ", as the only column left"
    if all(column.mean_length <= _SHORT_CHARACTERS for column in left):
        # A row without a part of its answer could not be used.
        parts = [column for column in left if column.is_in_all] or left
        if len(parts) == 1:
            return parts, ", as the only column left that all rows have"
        how = " as one JSON object, because no column is named like an answer; remove those that are not part of it"
        return parts, how
    return [max(left, key=lambda column: column.mean_length)], ", because its values are the longest"


def _noun(answers: Sequence[_Column]) -> str:
    name = " ".join(answers[0].parts) if len(answers) == 1 else ""
    return "" if name in _GENERIC else name


def _is_number(text: object) -> bool:
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True
