"""LoHa: the element-wise product of two low-rank matrices. Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara)."""

from __future__ import annotations

from typing import Any

from edgetune_export.adapters.shapes import Delta
from edgetune_export.architectures.shape import SizedModule
from pydantic import AliasChoices, Field, PositiveInt

from .common.peft import TargetOptions, WeightMethod, array


class LoHaOptions(TargetOptions):
    """Options of LoHa, named as in PEFT. The adapter in the bundle has rank r²."""

    r: PositiveInt = Field(4, validation_alias=AliasChoices("r", "rank"), description="Rank of each matrix.")
    alpha: float = Field(8, gt=0, description="The update is scaled by alpha / r.")


class LoHa(WeightMethod[LoHaOptions]):
    """Two matrices of rank r, multiplied to one of rank r²: use it for a high-rank update from few parameters."""

    options = LoHaOptions
    peft_type = "LOHA"

    def shipped_rank(self, options: LoHaOptions) -> int:
        """r², the rank of the element-wise product."""
        return options.r**2

    def trained_parameters_in(self, module: SizedModule, options: LoHaOptions) -> int:
        """The factors of both matrices."""
        return 2 * options.r * module.values_per_rank

    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """(B1·A1)∘(B2·A2) as one product: row-wise Kronecker product of B1 and B2, column-wise of A1 and A2."""
        (name,) = layer.active_adapters
        b1, b2 = layer.hada_w1_a[name], layer.hada_w2_a[name]
        a1, a2 = layer.hada_w1_b[name], layer.hada_w2_b[name]
        b = (b1[:, :, None] * b2[:, None, :]).flatten(1) * layer.scaling[name]
        return Delta(array((a1[:, None, :] * a2[None, :, :]).flatten(0, 1)), array(b))


METHOD = LoHa()
