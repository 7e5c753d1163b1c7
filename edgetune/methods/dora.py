"""DoRA: LoRA on the direction of the weights, with a separate magnitude. Liu et al. 2024, arXiv:2402.09353."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .common.dense import DenseMethod, DenseOptions
from .common.peft import Alpha, Dropout, Rank, lora_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from .common.base import TrainedModules


class DoraOptions(DenseOptions):
    """Options of DoRA, named as in PEFT."""

    r: Rank = 16
    lora_alpha: Alpha = 32
    lora_dropout: Dropout = 0.0


class Dora(DenseMethod):
    """LoRA with a trained magnitude per output: use it when low-rank LoRA is not enough and a full model fits."""

    options = DoraOptions
    peft_type = "LORA"

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """A LoRA with use_dora."""
        return super().wrote(config) and bool(config.get("use_dora"))

    def trained_parameters(self, trained: TrainedModules, options: DoraOptions) -> int:
        """Both factors, and the magnitude of each output."""
        return sum(options.r * m.values_per_rank + m.rows for m in trained.modules)

    def config(self, base: PreTrainedModel, options: DoraOptions, steps: int) -> LoraConfig:
        """PEFT's configuration."""
        return lora_config(base, options, use_dora=True)


METHOD = Dora()
