"""Base class of the methods whose checkpoint is a plain LoRA."""

from __future__ import annotations

from functools import partial

from edgetune_export.adapters.fold import fold_peft, merge
from edgetune_export.adapters.shapes import Folded

from .base import Checkpoint, O
from .peft import PeftMethod, module_weight


class LoraCheckpoint(PeftMethod[O]):
    """A method whose checkpoint is a plain LoRA."""

    takes_scale = True
    takes_encoders = True

    def shapes(self, options: O) -> tuple[str, ...]:
        """Low-rank, which is exact, or merged."""
        return ("low_rank", "merged")

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """Read the folder, which may come from elsewhere; see `fold_peft` for what is refused."""
        adapter = fold_peft(checkpoint.folder, checkpoint.name, self.name)
        if shape == "low_rank":
            return adapter
        return merge(adapter, partial(module_weight, checkpoint.base), checkpoint.scale)
