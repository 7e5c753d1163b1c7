"""LoRA initialized from the base's weights, which changes the base: PiSSA, OLoRA.

The trained adapter is saved as the difference from its initialization: a LoRA of twice the rank on the original base,
made by PEFT's own conversion.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import AliasChoices, Field, PositiveInt

from edgetune.methods.common.base import rate_factor

from .lora_checkpoint import LoraCheckpoint
from .peft import Dropout, TargetOptions, check_targets, lora_config

if TYPE_CHECKING:
    from edgetune_export.architectures.shape import BaseShape
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class InitializedOptions(TargetOptions):
    """Options of a LoRA that is initialized from the base's weights. In the bundle it has twice the rank."""

    r: PositiveInt = Field(8, validation_alias=AliasChoices("r", "rank"), description="Rank in training.")
    lora_alpha: float = Field(
        8, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"), description="The update is scaled by alpha / r."
    )
    lora_dropout: Dropout = 0.0
    learning_rate_factor: float = rate_factor(0.2)


class Initialized(LoraCheckpoint[InitializedOptions]):
    """LoRA that is initialized from the base's weights; `start` is the value of PEFT's init_lora_weights."""

    options = InitializedOptions
    trains_base = True
    takes_encoders = False
    start: str

    def shipped_rank(self, options: InitializedOptions) -> int:
        """The rank of the trained update plus that of its initialization."""
        return 2 * options.r

    def trained_parameters(self, base: BaseShape, options: InitializedOptions) -> int:
        """Both factors of each module."""
        return sum(options.r * module.values_per_rank for module in self.trained_modules(base, options))

    def attach(self, base: PreTrainedModel, options: InitializedOptions, steps: int) -> PeftModel:
        """Add LoRA modules to `base` and subtract their initial product from its weights; `model.start` keeps it."""
        check_targets(base, options.target_modules)
        model = super().attach(base, options, steps)
        model.start = TemporaryDirectory(prefix="edgetune-")
        config = model.peft_config["default"]
        # Otherwise PEFT would compute the initialization again when it loads it.
        config.init_lora_weights = True
        model.save_pretrained(model.start.name)
        config.init_lora_weights = self.start
        return model

    def config(self, base: PreTrainedModel, options: InitializedOptions, steps: int) -> LoraConfig:
        """PEFT's configuration."""
        return lora_config(base, options, init_lora_weights=self.start)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write a LoRA of twice the rank for the original base."""
        start = model.start.name
        model.save_pretrained(str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=start)

    def detach(self, model: PeftModel) -> None:
        """Remove PEFT's layers; the base still lacks the initial product."""
        super().detach(model)
        model.start.cleanup()
