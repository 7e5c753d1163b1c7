"""PiSSA and OLoRA: LoRA initialized from the base's weights, which changes the base.

PiSSA, with the largest singular values: Meng et al. 2024, arXiv:2404.02948. OLoRA, with an orthonormal basis:
Büyükakyüz 2024, arXiv:2406.01775.

The trained adapter is saved as the difference from its initialization: a LoRA of twice the rank on the original base,
made by PEFT's own conversion.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import UsageError

from .common.base import rate_factor
from .common.lora_checkpoint import LoraCheckpoint
from .common.peft import Alpha, LowRankOptions, Rank, save_peft, targets_among

if TYPE_CHECKING:
    from edgetune_export.architectures.shape import SizedModule
    from peft import PeftModel
    from transformers import PreTrainedModel


class PissaOptions(LowRankOptions):
    """Options of a LoRA that is initialized from the base's weights. In the bundle it has twice the rank."""

    r: Rank = 8
    lora_alpha: Alpha = 8
    learning_rate_factor: float = rate_factor(0.2)


class Pissa(LoraCheckpoint[PissaOptions]):
    """LoRA that trains the principal components of the base's weights: use it when plain LoRA learns too slowly."""

    options = PissaOptions
    trains_base = True
    takes_encoders = False
    # The value of PEFT's init_lora_weights. Fast randomized SVD: the full SVD takes minutes and reaches the same loss
    # (the paper, section 5.4).
    start = "pissa_niter_4"

    def shipped_rank(self, options: PissaOptions) -> int:
        """The rank of the trained update plus that of its initialization."""
        return 2 * options.r

    def check(self, options: PissaOptions, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Raise UsageError for a target module that the base lacks, and for a rank above that of its weights."""
        super().check(options, linear, shapes)
        smallest = min(targets_among(linear, options), key=_full_rank)
        if options.r > _full_rank(smallest):
            message = f"r is {options.r}, but {smallest.name} has {smallest.rows}x{smallest.columns} weights"
            raise UsageError(message, f"set r to {_full_rank(smallest)} or less, or use other target_modules")

    def attach(self, base: PreTrainedModel, options: PissaOptions, steps: int) -> PeftModel:
        """Add LoRA modules to `base` and subtract their initial product from its weights; `model.start` keeps it."""
        model = super().attach(base, options, steps)
        model.start = TemporaryDirectory(prefix="edgetune-")
        config = model.peft_config["default"]
        # Otherwise PEFT would compute the initialization again when it loads it.
        config.init_lora_weights = True
        save_peft(model, Path(model.start.name))
        config.init_lora_weights = self.start
        return model

    def peft_settings(self, options: PissaOptions, steps: int) -> Mapping[str, Any]:
        """The initialization."""
        return {"init_lora_weights": self.start}

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write a LoRA of twice the rank for the original base."""
        save_peft(model, folder, path_initial_model_for_weight_conversion=model.start.name)

    def detach(self, model: PeftModel) -> None:
        """Remove PEFT's layers; the base still lacks the initial product."""
        super().detach(model)
        model.start.cleanup()


def _full_rank(module: SizedModule) -> int:
    """The highest rank that the module's weights can have, and thus the most components to start from."""
    return min(module.rows, module.columns)


class OLora(Pissa):
    """LoRA with orthonormal initialization: use it like PiSSA; it initializes faster."""

    variant = "olora"
    start = "olora"


METHOD = Pissa()
VARIANTS = (OLora(),)
