"""LoKr: the Kronecker product of a small matrix and a low-rank one. Yeh et al. 2023, arXiv:2309.14859 (LyCORIS)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_runtime.errors import IncompatibleError
from pydantic import AliasChoices, Field, PositiveInt

from .common.peft import TargetOptions, WeightMethod, array, targets_among

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

    def check(self, options: LoKrOptions, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Raise UsageError for a target module that the base lacks, and what `factors` raises."""
        super().check(options, linear, shapes)
        if LowRank.shape in shapes:
            for module in targets_among(linear, options):
                small, (rows, columns) = _sizes(module, options)
                large = options.r if _is_product(rows, columns, options) else min(rows, columns)
                _check_rank(module.rows, module.columns, min(small) * large)

    def trained_parameters_in(self, module: SizedModule, options: LoKrOptions) -> int:
        """The smaller factor, and the larger one as a product if that has fewer numbers."""
        (small_rows, small_columns), (rows, columns) = _sizes(module, options)
        large = options.r * (rows + columns) if _is_product(rows, columns, options) else rows * columns
        return small_rows * small_columns + large

    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """(B1·A1)⊗(B2·A2) = (B1⊗B2)·(A1⊗A2). Raises IncompatibleError if that has full rank."""
        import torch

        (b1, a1), (b2, a2) = _pair(layer, "w1"), _pair(layer, "w2")
        b, a = torch.kron(b1, b2.contiguous()), torch.kron(a1, a2.contiguous())
        _check_rank(b.shape[0], a.shape[1], a.shape[0])
        (name,) = layer.active_adapters
        return Delta(array(a), array(b * layer.scaling[name]))


def _sizes(module: SizedModule, options: LoKrOptions) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the smaller factor and of the larger one."""
    small_rows, small_columns = (_smaller(size, options.decompose_factor) for size in (module.rows, module.columns))
    return (small_rows, small_columns), (module.rows // small_rows, module.columns // small_columns)


def _is_product(rows: int, columns: int, options: LoKrOptions) -> bool:
    """Whether PEFT makes a larger factor of this size as a product of rank `r`."""
    return options.r < max(rows, columns) / 2


def _check_rank(rows: int, columns: int, rank: int) -> None:
    """IncompatibleError if the rank is that of any change of these weights."""
    if rank >= min(rows, columns):
        message = f"the update of {rows}x{columns} weights has full rank ({rank})"
        raise IncompatibleError(message, "lower r or decompose_factor, or set merged: true")


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
