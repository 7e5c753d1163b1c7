"""DoRA: LoRA on the direction of the weights, and their size apart. Liu et al. 2024, arXiv:2402.09353."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field, PositiveInt

from ._dense import DenseMethod, DenseOptions
from ._peft import peft_targets, task_type

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


class DoraOptions(DenseOptions):
    """Options of DoRA, by PEFT's names."""

    r: PositiveInt = Field(16, validation_alias=AliasChoices("r", "rank"), description="Rank of the update.")
    lora_alpha: float = Field(
        32, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"), description="The update counts alpha / r."
    )
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("lora_dropout", "dropout"),
        description="Share of inputs dropped.",
    )


class Dora(DenseMethod):
    """LoRA and a learned size of each output: take it where LoRA of a small rank falls short and a model fits."""

    options = DoraOptions
    peft_type = "LORA"

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """A LoRA with use_dora."""
        return super().wrote(config) and bool(config.get("use_dora"))

    def config(self, base: PreTrainedModel, options: DoraOptions, steps: int) -> LoraConfig:
        """PEFT's configuration."""
        from peft import LoraConfig  # noqa: PLC0415 - torch only when training

        return LoraConfig(
            task_type=task_type(base),
            r=options.r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            use_dora=True,
            target_modules=peft_targets(options.target_modules),
        )


METHOD = Dora()
