"""Rows in, packed batches and their loss out: each learned token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from edgetune.objectives.example import Example

from .chunks import summed_loss
from .packing import ATTENTION, PackedRows, pack

if TYPE_CHECKING:
    from peft import PeftModel


class NextToken:
    """Each learned token is predicted from those before it, in rows packed without padding."""

    attention: str | None = ATTENTION

    def extend(self, model: PeftModel) -> None:
        """Nothing is trained besides the method's weights."""

    def learned(self, row: Example) -> int:
        """The learned tokens."""
        return sum(row.learned)

    def batch(self, rows: Sequence[Example]) -> PackedRows:
        """The rows behind one another."""
        return pack(rows)

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: PackedRows) -> torch.Tensor:
        """Cross entropy, with logits only where there is loss."""

        def loss_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            return cross_entropy(logits, batch.targets[rows], reduction="sum")

        return summed_loss(partial(packed_logits, forward, batch), model, loss_of)

    def save(self, model: PeftModel, folder: Path) -> None:
        """There is nothing else to write."""


def packed_logits(forward: Callable[..., Any], packed: PackedRows) -> torch.Tensor:
    """The model's logits before each learned token [learned, vocabulary]."""
    logits: torch.Tensor = forward(
        input_ids=packed.tokens,
        position_ids=packed.positions,
        logits_to_keep=packed.predictors,
        packed=packed,
        use_cache=False,
    ).logits[0]
    return logits


NEXT_TOKEN = NextToken()
"""What decoders learn."""
