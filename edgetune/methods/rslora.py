"""rsLoRA: LoRA scaled by alpha / sqrt(r). Kalajdzievski 2023, arXiv:2312.03732."""

from __future__ import annotations

from pydantic import Field

from .lora import Lora, LoraOptions


class RsLoraOptions(LoraOptions):
    """Options of LoRA, with use_rslora as the default."""

    use_rslora: bool = Field(True, description="Scale by alpha / sqrt(r), which is more stable for high ranks.")
    lora_alpha: float = Field(8, gt=0, description="The update is scaled by alpha / sqrt(r).")


class RsLora(Lora):
    """LoRA whose update keeps its size at high ranks: use it for ranks of 32 and more."""

    options = RsLoraOptions
    # Its checkpoints are loaded as lora.
    peft_type = ""


METHOD = RsLora()
