"""BOFT: the weights are rotated by a product of sparse orthogonal matrices. Liu et al. 2023, arXiv:2311.06243."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from edgetune.methods.common.base import rate_factor

from .common.dense import DenseMethod, DenseOptions
from .common.peft import peft_targets, task_type

if TYPE_CHECKING:
    from edgetune_export.architectures.shape import BaseShape
    from peft import BOFTConfig
    from transformers import PreTrainedModel


class BoftOptions(DenseOptions):
    """Options of BOFT, named as in PEFT."""

    boft_block_size: PositiveInt = Field(4, description="Inputs per rotation; must divide a module's inputs.")
    boft_n_butterfly_factor: PositiveInt = Field(1, description="Number of sparse factors; 1 is the same as OFT.")
    learning_rate_factor: float = rate_factor(2.0)


class Boft(DenseMethod):
    """OFT whose rotations reach across blocks, slower to train: use it when OFT's blocks are too local."""

    options = BoftOptions
    peft_type = "BOFT"

    def trained_parameters(self, base: BaseShape, options: BoftOptions) -> int:
        """The blocks of each factor, and a scale per output; without its CUDA extension, PEFT takes one factor."""
        return sum(
            options.boft_n_butterfly_factor * options.boft_block_size * module.columns + module.rows
            for module in self.trained_modules(base, options)
        )

    def config(self, base: PreTrainedModel, options: BoftOptions, steps: int) -> BOFTConfig:
        """PEFT's configuration."""
        from peft import BOFTConfig  # noqa: PLC0415 - torch only when training

        return BOFTConfig(
            task_type=task_type(base),
            boft_block_size=options.boft_block_size,
            boft_n_butterfly_factor=options.boft_n_butterfly_factor,
            target_modules=peft_targets(options.target_modules),
        )


METHOD = Boft()
