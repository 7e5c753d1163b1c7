"""The interface between the training loop and an objective: rows, batches and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 2**23
"""The loss is computed on this many logits at a time."""


class TrainingRow(Protocol):
    """A row to train on."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the model reads."""

    @property
    def weight(self) -> float:
        """From 0 to 1; the loss of the row is multiplied by it."""


def row_length(row: TrainingRow) -> int:
    """Number of tokens of a row."""
    return len(row.tokens)


class Batch(Protocol):
    """Rows for one forward pass."""

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""


R_contra = TypeVar("R_contra", bound=TrainingRow, contravariant=True)


class Objective(Protocol[R_contra]):
    """What is learned from rows."""

    unit: str
    """What a learned prediction is about, for which losses are given: token or row."""

    def prepare(self, base: PreTrainedModel) -> None:
        """Make `base`, on the training device, take the batches of this objective; the attention that it sets is undone
        after the training."""

    def extend(self, model: PeftModel) -> None:
        """Add the weights that are trained besides the method's own to `model`."""

    def learned(self, row: R_contra) -> int:
        """Number of learned predictions in the row."""

    def kept_bytes(self, rows: Iterable[R_contra]) -> int:
        """Memory of the host, not of a GPU, that is kept for the rows after their first pass."""

    def shared(self, rows: Sequence[R_contra]) -> int:
        """Number of first tokens, the same in all rows, that a batch of them computes once."""

    def batch(self, rows: Sequence[R_contra]) -> Batch:
        """The rows for one forward pass."""

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: Any) -> torch.Tensor:  # noqa: ANN401 - its own
        """Summed loss (nats) of the batch; `forward` runs `model`, possibly wrapped for several processes."""

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write the weights that `extend` added to `folder`, beside PEFT's files."""


def total_weight(objective: Objective[R_contra], rows: Iterable[R_contra]) -> float:
    """The sum of the weights of all learned predictions in the rows: their summed loss divided by it is their mean."""
    return sum(objective.learned(row) * row.weight for row in rows)
