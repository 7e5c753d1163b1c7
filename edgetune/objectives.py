"""Rows in, batches and their loss out: what a training learns. The loop in train.py knows nothing else of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch.nn.functional import cross_entropy

from .chunks import summed_loss
from .data import Example
from .packing import ATTENTION, Packed, pack

if TYPE_CHECKING:
    from peft import PeftModel


class Row(Protocol):
    """What every row of a training has."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the model reads."""


def row_length(row: Row) -> int:
    """Tokens of a row."""
    return len(row.tokens)


class Batch(Protocol):
    """Rows for one forward pass; `targets` holds a number for each thing that is predicted."""

    @property
    def targets(self) -> torch.Tensor:
        """What is to be predicted, int64 [n]."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""


R_contra = TypeVar("R_contra", bound=Row, contravariant=True)


class Objective(Protocol[R_contra]):
    """What is learned from rows. `attention` is the implementation that its batches need; None keeps the base's."""

    attention: str | None

    def extend(self, model: PeftModel) -> None:
        """Add to `model` what is trained besides the method's own weights."""

    def learned(self, row: R_contra) -> int:
        """How many predictions of the row the model learns."""

    def batch(self, rows: Sequence[R_contra]) -> Batch:
        """The rows for one forward pass."""

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: Any) -> torch.Tensor:  # noqa: ANN401 - its own
        """Summed loss (nats) of the batch; `forward` runs `model`, in all processes."""

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write what `extend` added into `folder`, beside PEFT's files."""


class NextToken:
    """Each learned token is predicted from those before it, in rows packed without padding."""

    attention: str | None = ATTENTION

    def extend(self, model: PeftModel) -> None:
        """Nothing is trained besides the method's weights."""

    def learned(self, row: Example) -> int:
        """The learned tokens."""
        return sum(row.learned)

    def batch(self, rows: Sequence[Example]) -> Packed:
        """The rows behind one another."""
        return pack(rows)

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: Packed) -> torch.Tensor:
        """Cross entropy, with logits only where there is loss."""

        def loss_of(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            return cross_entropy(logits, batch.targets[rows], reduction="sum")

        return summed_loss(partial(packed_logits, forward, batch), model, loss_of)

    def save(self, model: PeftModel, folder: Path) -> None:
        """There is nothing else to write."""


def packed_logits(forward: Callable[..., Any], packed: Packed) -> torch.Tensor:
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
