"""OFT: the weights are rotated in blocks. Qiu et al. 2023, arXiv:2306.07280; Cayley-Neumann: arXiv:2506.19847."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from edgetune_export.architectures.shape import SizedModule
from pydantic import Field, PositiveInt

from .common.base import rate_factor
from .common.dense import DenseMethod, DenseOptions


class OftOptions(DenseOptions):
    """Options of OFT, named as in PEFT."""

    oft_block_size: PositiveInt = Field(32, description="Inputs per rotation; must divide a module's inputs.")
    learning_rate_factor: float = rate_factor(2.0)


class Oft(DenseMethod):
    """A rotation of each module's inputs that keeps the angles between weights: use it to stay close to the base."""

    options = OftOptions
    peft_type = "OFT"

    def trained_parameters_in(self, module: SizedModule, options: OftOptions) -> int:
        """A skew-symmetric matrix per block."""
        return _rotations(module.columns, options.oft_block_size)

    def peft_settings(self, options: OftOptions, steps: int) -> Mapping[str, Any]:
        """No number of blocks, because their size is an option."""
        return {"r": 0}


@cache
def _rotations(columns: int, size: int) -> int:
    """The values above the diagonal of all blocks; a size that does not divide the columns is changed as PEFT does."""
    block = min((width for width in range(1, columns + 1) if columns % width == 0), key=lambda width: abs(width - size))
    return columns * (block - 1) // 2


METHOD = Oft()
