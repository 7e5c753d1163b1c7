"""LoRA that starts from the base's own weights, which the start changes: PiSSA, OLoRA.

What was trained is saved as the difference from the start, a LoRA of twice the rank on the unchanged base, as PEFT's
own conversion does it.
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
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


class InitializedOptions(TargetOptions):
    """Options of a LoRA that starts from the base's weights; in the bundle it has twice the rank."""

    r: PositiveInt = Field(8, validation_alias=AliasChoices("r", "rank"), description="Rank of the update in training.")
    lora_alpha: float = Field(
        8, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"), description="The update counts alpha / r."
    )
    lora_dropout: Dropout = 0.0
    learning_rate_factor: float = rate_factor(0.2)


class Initialized(LoraCheckpoint[InitializedOptions]):
    """LoRA whose start, called `start` by PEFT's init_lora_weights, is taken from the base's weights."""

    options = InitializedOptions
    trains_base = True
    takes_encoders = False
    start: str

    def shipped_rank(self, options: InitializedOptions) -> int:
        """That of the update and of its start."""
        return 2 * options.r

    def attach(self, base: PreTrainedModel, options: InitializedOptions, steps: int) -> PeftModel:
        """Add LoRA modules to `base` and take their start off its weights; the start is kept beside the model."""
        check_targets(base, options.target_modules)
        model = super().attach(base, options, steps)
        model.start = TemporaryDirectory(prefix="edgetune-")
        config = model.peft_config["default"]
        # Else PEFT would compute the start anew when it reads it.
        config.init_lora_weights = True
        model.save_pretrained(model.start.name)
        config.init_lora_weights = self.start
        return model

    def config(self, base: PreTrainedModel, options: InitializedOptions, steps: int) -> LoraConfig:
        """PEFT's configuration."""
        return lora_config(base, options, init_lora_weights=self.start)

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write a LoRA of twice the rank on the base as it was."""
        start = model.start.name
        model.save_pretrained(str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=start)

    def detach(self, model: PeftModel) -> None:
        """Take PEFT's layers off; the base has lost its start."""
        super().detach(model)
        model.start.cleanup()
