"""Methods whose weight update has full rank: merged, or truncated to a low rank if the recipe allows it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from edgetune_export.adapters.factor import truncated
from edgetune_export.adapters.shapes import Floats, Folded, Merged
from edgetune_export.architectures.shape import SizedModule
from pydantic import Field

from .base import Checkpoint
from .peft import PeftMethod, TargetOptions, base_weight, merged_parameter, merged_weights, peft_model, tuned_layers

GUESSED_RANK = 64


class DenseOptions(TargetOptions):
    """Options of methods whose weight update has full rank."""

    max_error: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Ship a low-rank adapter whose truncation error is at most this share of the update's norm (0.1: "
        "10 %). null: ship a full model.",
    )


class DenseMethod(PeftMethod[Any]):
    """A PEFT method that is exact only when merged."""

    def shapes(self, options: DenseOptions) -> tuple[str, ...]:
        """A full model, unless `max_error` allows a low-rank adapter."""
        return ("merged",) if options.max_error is None else ("low_rank", "merged")

    def shipped_ranks(self, modules: Sequence[SizedModule], options: DenseOptions) -> list[int]:
        """A guess, up to the rank that a module can have."""
        rank = GUESSED_RANK if self.guesses_rank(options) else 0
        return [min(rank, module.rows, module.columns) for module in modules]

    def guesses_rank(self, options: DenseOptions) -> bool:
        """Yes, for a low-rank adapter."""
        return options.max_error is not None

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The merged weights, or the truncated update of each layer."""
        with peft_model(checkpoint) as model:
            layers = dict(tuned_layers(model))
        if shape == "merged":
            return Merged(checkpoint.name, self.name, merged_weights(layers))
        assert isinstance(checkpoint.options, DenseOptions) and checkpoint.options.max_error is not None
        changes = {module: partial(_change, layer) for module, layer in layers.items()}
        return truncated(checkpoint.name, self.name, changes, checkpoint.options.max_error)


def _change(layer: Any) -> Floats:  # noqa: ANN401 - PEFT carries no types
    return merged_parameter(layer) - base_weight(layer)
