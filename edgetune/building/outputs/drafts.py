"""Makes the draft table of a task from its rows, and predicts the tokens per step on the validation rows."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune_export.drafts import Row, table_of, tokens_per_step
from edgetune_runtime import engines
from edgetune_runtime.decoding.batch_cost import BatchCost
from edgetune_runtime.decoding.drafts import DraftTable
from edgetune_runtime.engines.base import Tokenizer

from edgetune.objectives.example import Example

_MIN_TOKENS_PER_STEP = 1.1
"""A table that gives less is not shipped."""


def draft_of(
    train: Sequence[Example], validation: Sequence[Example], tokenizer: Tokenizer, digest: str, target: str
) -> tuple[DraftTable | None, float]:
    """The table of the training rows (None if it gains too little), and the tokens per step on the validation rows.

    `digest` is that of the tokenizer, and `target` the format whose engine's costs decide.
    """
    rows, held_out = _rows(train), _rows(validation)
    if not rows:
        return None, 1.0
    table = table_of(rows, tokenizer.is_end, digest)
    predicted = tokens_per_step(table, held_out or rows, BatchCost(engines.load(target).BATCH_COST))
    return (table if predicted >= _MIN_TOKENS_PER_STEP else None), predicted


def _rows(examples: Sequence[Example]) -> list[Row]:
    """The rows with a prompt: a text row has none."""
    return [Row(example.tokens, example.prompt_length) for example in examples if example.prompt_length > 1]
