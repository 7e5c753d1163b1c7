"""What a training learns: rows, their batches and their loss. The training loop knows nothing else of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

LOGITS_PER_CHUNK = 2**23
"""The loss is computed on so many logits at a time."""


class TrainingRow(Protocol):
    """What every row of a training has."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the model reads."""


def row_length(row: TrainingRow) -> int:
    """Tokens of a row."""
    return len(row.tokens)


class Batch(Protocol):
    """Rows for one forward pass; `targets` holds a number for each thing that is predicted."""

    @property
    def targets(self) -> torch.Tensor:
        """What is to be predicted, int64 [n]."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""


R_contra = TypeVar("R_contra", bound=TrainingRow, contravariant=True)


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
