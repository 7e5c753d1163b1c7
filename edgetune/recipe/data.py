"""The data of a recipe: the rows of a task, their columns and changed copies, and plain text.

The text under a field describes its key. The JSON schema and docs/recipe.md are generated from these texts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from edgetune.common.files import expanded

from .part import OrSwitch, RecipePart, Text
from .rows import Rows

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like a hub id: owner/name without a file suffix such as .jsonl."""
    match = HUB_ID.fullmatch(source)
    return match is not None and not SUFFIX.search(match["id"])


def _beside_the_recipe(value: object, text: ValidatorFunctionWrapHandler, info: ValidationInfo) -> str | Rows:
    if isinstance(value, Rows):
        return value
    source: str = text(value)
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return source
    path = folder / expanded(source)
    return source if is_hub_id(source) and not path.exists() else str(path)


def _from_the_recipe(value: object, text: ValidatorFunctionWrapHandler, info: ValidationInfo) -> str:
    folder: Path = (info.context or {}).get("folder", Path())
    return str(folder / expanded(text(value)))


def _without_rows(source: str | Rows) -> str:
    return source.summary if isinstance(source, Rows) else source


if TYPE_CHECKING:
    Data = str | Rows
else:
    # Only Python code can give rows, so schema and messages know texts alone.
    Data = Annotated[Text, WrapValidator(_beside_the_recipe), PlainSerializer(_without_rows)]
    """A data file, a hub id, or rows from memory."""

Folder = Annotated[Text, WrapValidator(_from_the_recipe)]
"""A folder, relative to that of the recipe."""


class Columns(RecipePart):
    """Which columns of the data have other names: prompt and completion, or messages and tools, or text."""

    prompt: Text | None = None
    """Column of the prompt."""
    completion: Text | tuple[Text, ...] | None = None
    """Column of the completion, or a list of columns, which become one JSON object."""
    messages: Text | None = None
    """Column of the conversation."""
    tools: Text = "tools"
    """Column of a conversation's tools."""
    text: Text | None = None
    """Column of plain text."""
    weight: Text = "weight"
    """Column of a row's weight in training, from 0 to 1, where rows have one."""

    @field_validator("completion")
    @classmethod
    def _some(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("the list is empty; name at least one column")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Columns:
        named = [key for key in ("prompt", "completion", "messages", "text") if getattr(self, key) is not None]
        if named not in (["prompt", "completion"], ["messages"], ["text"]):
            problem = f"{' and '.join(named)} do not make a form of rows" if named else "names no column"
            raise ValueError(f"{problem}; name prompt and completion, or messages, or text")
        return self


class NegativesSpec(RecipePart):
    """Rows with prompts that are not of this task: those of the recipe's other adapters, and yours."""

    completion: Any
    """The answer to such prompts, such as {"service": "none"}."""
    prompts: tuple[Text, ...] = ()
    """Your own prompts that are not of this task, which are used before those of other adapters."""
    share: float = Field(default=0.1, gt=0, le=1)
    """Most such rows, as a share of the training rows."""


class AugmentSpec(RecipePart):
    """Changed copies of the training rows; `augment: true` has all defaults. Validation rows stay as they are.

    Values of the answer that occur in the prompt are exchanged in both for other ones of the same field, in answers of
    plain text numbers alone. Clauses change their order where the answer has a call for each. `edgetune data preview`
    shows the copies. The same seed gives the same ones.
    """

    copies: int = Field(default=3, ge=1, le=1000)
    """Most copies of a row. A training pass reads all of them, so it takes longer."""
    values: dict[Text, tuple[Text | int | float, ...]] = Field(default_factory=dict)
    """More values by the field of the answer, such as `area: [attic, cellar]`; nested fields as `slots.area`."""
    noise: float = Field(default=0.3, ge=0, le=1)
    """Share of the copies whose prompt also reads as if spoken (lower case, no punctuation, and in English number words
    and words that sound alike) or typed in haste. Values that the answer repeats stay as they are."""
    negatives: NegativesSpec | None = None
    """Rows with prompts of other tasks. null: none."""


_OTHERS = {
    "validation": ("train", "give rows that are not learned, or remove it to hold some out"),
    "confidence": ("validation", "give other rows, or remove it to take every second validation row"),
}
"""The key whose rows each key may not have, with the remedy."""


def _are_one(source: str, other: str | Rows | None) -> bool:
    """Whether two sources are one file or hub id, also by other paths."""
    return isinstance(other, str) and os.path.realpath(source) == os.path.realpath(other)


class DataSpec(RecipePart):
    """The rows of one task: JSONL, CSV or TSV files, or a hub id.

    A row has one of four forms: `messages`, ending with an assistant message; `prompt` and `completion`; `text` and
    `label`; or only `text`, all of which is learned. A completion that is an object or a list is learned as JSON.
    Messages may have `tool_calls` and results of the role `tool`; the row's `tools` define the tools. A `weight` from 0
    to 1 in a row multiplies its loss in training; a row of weight 0 is left out, and an assistant's message with weight
    0 is not learned.
    A hub id is `owner/name`, `owner/name:config` or `owner/name:config@split`; the default split is `train`.
    """

    train: Data
    """Training rows: a file (path relative to the recipe) or a hub id such as owner/name:config@split."""
    validation: Data | None = None
    """Validation rows, given like `train`. null: part of the training rows is held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows that is held out for validation if `validation` is not given."""
    confidence: Data | None = None
    """Rows on which the confidence of answers is fitted, given like `train`; none may be a training row. null: every
    second validation row, which then does not choose the checkpoint; all of them if there are fewer than 200, or if
    they choose none (`training: auto`)."""
    rows: PositiveInt | None = None
    """Train on at most this many of the training rows, chosen by the seed. null: all."""
    columns: Columns | None = None
    """Names of the columns; not needed for rows in one of the four standard forms."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count in the loss: those of the completions, or all."""
    augment: OrSwitch[AugmentSpec] = None
    """Changed copies of the training rows: true, or a mapping of options."""
    check_minutes: float | None = Field(default=None, ge=1, le=1e6, allow_inf_nan=False)
    """For how many minutes `edgetune data check` trains adapters to find wrong answers. null: it trains none."""
    _apart: Rows | None = PrivateAttr(default=None)

    @field_validator("validation", "confidence")
    @classmethod
    def _has_rows_of_its_own(cls, source: str | Rows | None, info: ValidationInfo) -> str | Rows | None:
        other, remedy = _OTHERS[str(info.field_name)]
        if isinstance(source, str) and _are_one(source, info.data.get(other)):
            raise ValueError(f"{Path(source).name} is also the data of {other}; {remedy}")
        return source

    @property
    def apart(self) -> Rows | None:
        """Rows that are compared later, whose prompts no row has that a build makes."""
        return self._apart

    def keeping_apart(self, rows: Rows) -> DataSpec:
        """The data of which a build makes no rows with prompts of these ones."""
        copy = self.model_copy()
        copy._apart = rows
        return copy


class TextSpec(RecipePart):
    """Plain text: a .txt file (one text), or JSONL, CSV or TSV files or a hub id with a column `text` (one text per
    row)."""

    train: Data
    """Training text: a file (path relative to the recipe) or a hub id."""
    validation: Data | None = None
    """Validation text, given like `train`. null: the end of the training text is held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training text that is held out if `validation` is not given."""
