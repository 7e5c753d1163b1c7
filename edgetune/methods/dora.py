"""DoRA: LoRA on the direction of the weights, with a separate magnitude. Liu et al. 2024, arXiv:2402.09353."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_export.architectures.shape import SizedModule

from .common.dense import DenseMethod, DenseOptions
from .common.peft import LowRankOptions


class DoraOptions(LowRankOptions, DenseOptions):
    """Options of DoRA, named as in PEFT."""


class Dora(DenseMethod):
    """LoRA with a trained magnitude per output: use it when low-rank LoRA is not enough and a full model fits."""

    options = DoraOptions
    peft_type = "LORA"

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """A LoRA with use_dora."""
        return super().wrote(config) and bool(config.get("use_dora"))

    def trained_parameters_in(self, module: SizedModule, options: DoraOptions) -> int:
        """Both factors, and the magnitude of each output."""
        return options.r * module.values_per_rank + module.rows

    def peft_settings(self, options: DoraOptions, steps: int) -> Mapping[str, Any]:
        """PEFT's name of DoRA."""
        return {"use_dora": True}


METHOD = Dora()
