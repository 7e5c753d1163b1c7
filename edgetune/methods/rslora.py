"""rsLoRA: LoRA scaled by alpha / sqrt(r). Kalajdzievski 2023, arXiv:2312.03732."""

from __future__ import annotations

from pydantic import Field

from .lora import Lora, LoraOptions


class RsLoraOptions(LoraOptions):
    """Options of LoRA, with use_rslora on."""

    use_rslora: bool = Field(True, description="Scale by alpha / sqrt(r), steadier for large ranks.")
    lora_alpha: float = Field(8, gt=0, description="The update counts alpha / sqrt(r).")


class RsLora(Lora):
    """LoRA whose update keeps its size as the rank grows: take it for ranks of 32 and more."""

    options = RsLoraOptions
    # Its folders are those of lora.
    peft_type = ""


METHOD = RsLora()
