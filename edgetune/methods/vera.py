"""VeRA: two vectors a module on random matrices that all modules share. Kopiczko et al. 2023, arXiv:2310.11454."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.shapes import Delta
from pydantic import AliasChoices, Field, PositiveInt

from edgetune.methods.common.base import rate_factor

from .common.peft import TargetOptions, WeightMethod, array, peft_targets, task_type

if TYPE_CHECKING:
    from peft import VeraConfig
    from transformers import PreTrainedModel


class VeraOptions(TargetOptions):
    """Options of VeRA, by PEFT's names. The adapter in the bundle is a product of rank `r`, as large as LoRA's."""

    r: PositiveInt = Field(64, validation_alias=AliasChoices("r", "rank"), description="Rank of the shared matrices.")
    d_initial: float = Field(0.1, description="First value of the vector between the matrices.")
    vera_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("vera_dropout", "dropout"),
        description="Share of inputs dropped.",
    )
    projection_prng_key: int = Field(0, ge=0, description="Seed of the shared matrices.")
    learning_rate_factor: float = rate_factor(10.0)


class Vera(WeightMethod[VeraOptions]):
    """Vectors on shared random matrices, the fewest trained numbers: take it for many adapters kept on a host."""

    options = VeraOptions
    peft_type = "VERA"

    def shipped_rank(self, options: VeraOptions) -> int:
        """That of the shared matrices."""
        return options.r

    def config(self, base: PreTrainedModel, options: VeraOptions, steps: int) -> VeraConfig:
        """PEFT's configuration."""
        from peft import VeraConfig  # noqa: PLC0415 - torch only when training

        return VeraConfig(
            task_type=task_type(base),
            r=options.r,
            d_initial=options.d_initial,
            vera_dropout=options.vera_dropout,
            projection_prng_key=options.projection_prng_key,
            target_modules=peft_targets(options.target_modules),
        )

    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """diag(b)·B · diag(d)·A, cut to the module's size."""
        (name,) = layer.active_adapters
        b, d = layer.vera_lambda_b[name], layer.vera_lambda_d[name]
        shared_a, shared_b = layer.vera_A[name], layer.vera_B[name]
        a = d[:, None] * shared_a[:, : layer.in_features]
        return Delta(array(a), array(b[:, None] * shared_b[: layer.out_features]))


METHOD = Vera()
