"""Base class of the methods whose checkpoint is a plain LoRA."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from edgetune_export.adapters.fold import fold_peft, merge
from edgetune_export.adapters.shapes import Folded
from edgetune_export.architectures.shape import SizedModule

from .base import Checkpoint
from .peft import LowRankOptions, PeftMethod, module_weight

L = TypeVar("L", bound=LowRankOptions)


class LoraCheckpoint(PeftMethod[L]):
    """A method whose checkpoint is a plain LoRA."""

    peft_type = "LORA"
    takes_scale = True
    takes_encoders = True

    def shapes(self, options: L) -> tuple[str, ...]:
        """Low-rank, which is exact, or merged."""
        return ("low_rank", "merged")

    def trained_parameters_in(self, module: SizedModule, options: L) -> int:
        """Both factors."""
        return options.r * module.values_per_rank

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """Read the folder, which may come from elsewhere; see `fold_peft` for what is refused."""
        adapter = fold_peft(checkpoint.folder, checkpoint.name, self.name)
        if shape == "low_rank":
            return adapter
        return merge(adapter, partial(module_weight, checkpoint.base), checkpoint.scale)
