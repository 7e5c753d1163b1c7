"""LoKr: the Kronecker product of a small matrix and a low-rank one. Yeh et al. 2023, arXiv:2309.14859 (LyCORIS)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.shapes import Delta
from edgetune_runtime.errors import IncompatibleError
from pydantic import AliasChoices, Field, PositiveInt

from .common.peft import TargetOptions, WeightMethod, array

if TYPE_CHECKING:
    import torch
    from edgetune_export.architectures.shape import SizedModule


class LoKrOptions(TargetOptions):
    """Options of LoKr, named as in PEFT. The adapter in the bundle has rank r·decompose_factor or less."""

    r: PositiveInt = Field(4, validation_alias=AliasChoices("r", "rank"), description="Rank of the larger factor.")
    alpha: float = Field(8, gt=0, description="The update is scaled by alpha / r.")
    decompose_factor: PositiveInt = Field(4, description="Size of the smaller factor.")


class LoKr(WeightMethod[LoKrOptions]):
    """A Kronecker product, which repeats one small update over a matrix: use it for the smallest checkpoints."""

    options = LoKrOptions
    peft_type = "LOKR"

    def shipped_rank(self, options: LoKrOptions) -> int:
        """The rank of the larger factor times the size of the smaller one."""
        return options.r * options.decompose_factor

    def trained_parameters_in(self, module: SizedModule, options: LoKrOptions) -> int:
        """The smaller factor, and the larger one as a product if that has fewer numbers, as PEFT makes them."""
        sizes = (module.rows, module.columns)
        small_rows, small_columns = (_smaller(size, options.decompose_factor) for size in sizes)
        rows, columns = module.rows // small_rows, module.columns // small_columns
        large = options.r * (rows + columns) if options.r < max(rows, columns) / 2 else rows * columns
        return small_rows * small_columns + large

    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """(B1·A1)⊗(B2·A2) = (B1⊗B2)·(A1⊗A2). Raises IncompatibleError if that has full rank."""
        import torch

        (b1, a1), (b2, a2) = _pair(layer, "w1"), _pair(layer, "w2")
        b, a = torch.kron(b1, b2.contiguous()), torch.kron(a1, a2.contiguous())
        if a.shape[0] >= min(b.shape[0], a.shape[1]):
            message = f"the update of {b.shape[0]}x{a.shape[1]} weights has full rank ({a.shape[0]})"
            raise IncompatibleError(message, "lower r or decompose_factor, or set merged: true")
        (name,) = layer.active_adapters
        return Delta(array(a), array(b * layer.scaling[name]))


def _smaller(size: int, most: int) -> int:
    """The size of the smaller factor: `most`, or the largest divisor below it and the square root."""
    if size % most == 0:
        return most
    return max(divisor for divisor in range(1, min(most, math.isqrt(size)) + 1) if size % divisor == 0)


def _pair(layer: Any, which: str) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - as above
    """One Kronecker factor as a product of two matrices; if stored as one matrix, the other is the identity."""
    import torch

    (name,) = layer.active_adapters
    whole = getattr(layer, f"lokr_{which}")
    if name not in whole:
        return getattr(layer, f"lokr_{which}_a")[name], getattr(layer, f"lokr_{which}_b")[name]
    matrix = whole[name]
    rows, columns = matrix.shape
    return (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))


METHOD = LoKr()
