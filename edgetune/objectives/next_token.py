"""Next-token prediction on packed rows, the objective of decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from edgetune.objectives.example import Example

from .chunks import summed_loss
from .packing import PackedRows, pack, shared_length, take_packed_rows

if TYPE_CHECKING:
    from peft import PeftModel


class PackedObjective:
    """What objectives for decoders have in common: rows packed without padding, and no weights of their own."""

    unit = "token"

    def prepare(self, base: PreTrainedModel) -> None:
        """The base takes packed rows."""
        take_packed_rows(base)

    def extend(self, model: PeftModel) -> None:
        """Nothing to add: only the method's weights are trained."""

    def learned(self, row: Example) -> int:
        """Number of learned tokens."""
        return sum(row.learned)

    def kept_bytes(self, rows: Iterable[Example]) -> int:
        """Nothing is kept."""
        return 0

    def shared(self, rows: Sequence[Example]) -> int:
        """The length of their common prefix."""
        return shared_length(rows)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Nothing to write besides the method's files."""


class NextToken(PackedObjective):
    """Predict each learned token from the tokens before it."""

    def batch(self, rows: Sequence[Example]) -> PackedRows:
        """The rows packed into one sequence."""
        return pack(rows)

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: PackedRows) -> torch.Tensor:
        """Summed cross entropy; logits are computed only for learned tokens."""

        def loss_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            # Not a product of vectors, which autocast computes in bfloat16.
            return (cross_entropy(logits, batch.targets[rows], reduction="none") * batch.weights[rows]).sum()

        return summed_loss(partial(packed_logits, forward, batch), model, loss_of)


def packed_logits(forward: Callable[..., Any], packed: PackedRows) -> torch.Tensor:
    """The logits that predict each learned token [learned, vocabulary]."""
    logits: torch.Tensor = forward(
        input_ids=packed.tokens,
        position_ids=packed.positions,
        logits_to_keep=packed.predictors,
        packed=packed,
        use_cache=False,
    ).logits[0]
    return logits


NEXT_TOKEN = NextToken()
"""The objective of decoders."""
