"""The `augment` key of a task's data: changed copies of its training rows."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from .part import RecipePart, Text


class NegativesSpec(RecipePart):
    """Rows with prompts that are not of this task: those of the recipe's other adapters, and yours."""

    completion: Any
    """The answer to such prompts, such as {"service": "none"}."""
    prompts: tuple[Text, ...] = ()
    """Your own prompts that are not of this task."""
    share: float = Field(default=0.1, gt=0, le=1)
    """Most such rows, as a share of the training rows."""


class AugmentSpec(RecipePart):
    """Changed copies of the training rows; `augment: true` has all defaults. Validation rows stay as they are.

    Values of the answer that occur in the prompt are exchanged in both for other ones of the same field, in answers of
    plain text numbers alone. Clauses change their order where the answer has a call for each. `edgetune data preview`
    shows the copies. The same seed gives the same ones.
    """

    copies: PositiveInt = 3
    """Most copies of a row. A training pass reads all of them, so it takes longer."""
    values: dict[Text, tuple[str | int | float, ...]] = Field(default_factory=dict)
    """More values by the field of the answer, such as `area: [attic, cellar]`; nested fields as `slots.area`."""
    noise: float = Field(default=0.3, ge=0, le=1)
    """Share of the copies whose prompt also reads as if spoken (lower case, no punctuation, and in English number words
    and words that sound alike) or typed in haste. Values that the answer repeats stay as they are."""
    negatives: NegativesSpec | None = None
    """Rows with prompts of other tasks. null: none."""
