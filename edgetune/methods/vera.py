"""VeRA: two vectors per module on random matrices shared by all modules. Kopiczko et al. 2023, arXiv:2310.11454."""

from __future__ import annotations

from typing import Any

from edgetune_export.adapters.shapes import Delta
from edgetune_export.architectures.shape import SizedModule
from pydantic import AliasChoices, Field, PositiveInt

from .common.base import rate_factor
from .common.peft import TargetOptions, WeightMethod, array


class VeraOptions(TargetOptions):
    """Options of VeRA, named as in PEFT. The adapter in the bundle has rank `r` and the size of such a LoRA."""

    r: PositiveInt = Field(64, validation_alias=AliasChoices("r", "rank"), description="Rank of the shared matrices.")
    d_initial: float = Field(0.1, description="Initial value of the vector between the matrices.")
    vera_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("vera_dropout", "dropout"),
        description="Dropout rate of the adapter's inputs.",
    )
    projection_prng_key: int = Field(0, ge=0, description="Seed of the shared matrices.")
    learning_rate_factor: float = rate_factor(10.0)


class Vera(WeightMethod[VeraOptions]):
    """Trained vectors on shared random matrices, the fewest parameters: use it for many checkpoints on a host."""

    options = VeraOptions
    peft_type = "VERA"

    def shipped_rank(self, options: VeraOptions) -> int:
        """The rank of the shared matrices."""
        return options.r

    def trained_parameters_in(self, module: SizedModule, options: VeraOptions) -> int:
        """Two vectors."""
        return module.rows + options.r

    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """diag(b)·B · diag(d)·A, with B and A cut to the module's size."""
        (name,) = layer.active_adapters
        b, d = layer.vera_lambda_b[name], layer.vera_lambda_d[name]
        shared_a, shared_b = layer.vera_A[name], layer.vera_B[name]
        a = d[:, None] * shared_a[:, : layer.in_features]
        return Delta(array(a), array(b[:, None] * shared_b[: layer.out_features]))


METHOD = Vera()
