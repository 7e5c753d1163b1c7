"""LoRA+: LoRA with a higher learning rate for B than for A. Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

from pydantic import Field

from .lora import Lora, LoraOptions


class LoraPlusOptions(LoraOptions):
    """Options of LoRA, with a separate learning rate for B."""

    loraplus_lr_ratio: float = Field(16.0, gt=0, description="Learning rate of B as a multiple of A's.")
    learning_rate_factor: float = Field(
        default=0.2, gt=0, description="A's learning rate as a multiple of training.learning_rate."
    )


class LoraPlus(Lora):
    """LoRA that learns in fewer steps: use it when you can afford few epochs only."""

    options = LoraPlusOptions
    # Its checkpoints are loaded as lora.
    peft_type = ""


METHOD = LoraPlus()
