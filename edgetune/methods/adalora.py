"""AdaLoRA: LoRA that moves rank to the modules that need it. Zhang et al. 2023, arXiv:2303.10512."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.shapes import Delta
from pydantic import AliasChoices, Field, PositiveInt, model_validator

from .common.base import trainable
from .common.peft import TargetOptions, WeightMethod, array

if TYPE_CHECKING:
    import torch
    from edgetune_export.architectures.shape import SizedModule
    from peft import PeftModel
    from transformers import PreTrainedModel

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraOptions(TargetOptions):
    """Options of AdaLoRA, named as in PEFT; the lengths of its phases are shares of the training steps."""

    target_r: PositiveInt = Field(
        8, validation_alias=AliasChoices("target_r", "r", "rank"), description="Mean rank after training."
    )
    init_r: PositiveInt | None = Field(
        None, description="Rank of every module before training, more than target_r. null: 1.5 times target_r."
    )
    lora_alpha: float = Field(
        32,
        gt=0,
        validation_alias=AliasChoices("lora_alpha", "alpha"),
        description="The update is scaled by alpha / init_r.",
    )
    tinit: float = Field(0.1, ge=0, lt=1, description="Share of the steps before ranks are reduced.")
    tfinal: float = Field(0.3, ge=0, lt=1, description="Share of the steps after the last reduction.")
    orth_reg_weight: float = Field(0.1, ge=0, description="Weight of the penalty that keeps the factors orthogonal.")

    @property
    def initial_rank(self) -> int:
        """The rank of every module before training."""
        return self.init_r or math.ceil(1.5 * self.target_r)

    @model_validator(mode="after")
    def _reduces_ranks(self) -> AdaLoraOptions:
        if self.initial_rank <= self.target_r:
            message = f"init_r is {self.init_r}, but ranks are reduced to a mean of {self.target_r} (target_r)"
            raise ValueError(f"{message}; give more than {self.target_r}, or remove init_r")
        return self

    @model_validator(mode="after")
    def _has_steps_between(self) -> AdaLoraOptions:
        if self.tinit + self.tfinal >= 1:
            message = f"tinit {self.tinit} and tfinal {self.tfinal} leave no steps in which ranks are reduced"
            raise ValueError(f"{message}; their sum must be below 1")
        return self


class AdaLora(WeightMethod[AdaLoraOptions]):
    """LoRA whose rank differs per module: use it when no single rank suits all modules."""

    options = AdaLoraOptions
    peft_type = "ADALORA"

    def shipped_rank(self, options: AdaLoraOptions) -> int:
        """The initial rank, which some modules may keep."""
        return options.initial_rank

    def trained_parameters_in(self, module: SizedModule, options: AdaLoraOptions) -> int:
        """Both factors and the values between them."""
        return (module.values_per_rank + 1) * options.initial_rank

    def peft_settings(self, options: AdaLoraOptions, steps: int) -> Mapping[str, Any]:
        """The initial rank, and the phases in steps."""
        return {
            "init_r": options.initial_rank,
            "tinit": int(options.tinit * steps),
            "tfinal": int(options.tfinal * steps),
            "deltaT": max(1, steps // 50),
            "total_step": steps,
        }

    def settled_step(self, options: AdaLoraOptions, steps: int) -> int:
        """The number of steps after which the mean rank is `target_r`."""
        after_last_reduction: int = self.peft_settings(options, steps)["tfinal"]
        return min(steps, steps - after_last_reduction + 1)

    def attach(self, base: PreTrainedModel, options: AdaLoraOptions, steps: int) -> PeftModel:
        """Add PEFT's trainable parts in float32 to `base`."""
        model = super().attach(base, options, steps)
        for name, parameter in model.named_parameters():
            # PEFT saves no ranks, and those that it casts to float32 lose that they are not trained.
            if ".ranknum." in name:
                parameter.requires_grad_(requires_grad=False)
        return model

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write PEFT's folder with all ranks, pruned ones as zeros, because PEFT scales a reduced rank differently."""
        config, ranks = _config(model), _config(model).rank_pattern
        config.rank_pattern = {}
        super().save(model, folder)
        config.rank_pattern = ranks

    def penalty(self, model: PeftModel) -> torch.Tensor | float:
        """The orthogonality penalty (equation 4 of the paper), which PEFT's own forward pass adds too."""
        import torch

        weight = _config(model).orth_reg_weight
        distances = []
        for name, factor in trainable(model):
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        mean: torch.Tensor = torch.stack(distances).mean()
        weighted: torch.Tensor = weight * mean
        return weighted

    def after_step(self, model: PeftModel, step: int) -> None:
        """Prune the least important ranks."""
        model.base_model.update_and_allocate(step)

    def state(self, model: PeftModel) -> Mapping[str, Any]:
        """The importances so far, and the ranks once they are final."""
        allocator = model.base_model.rankallocator
        return {**{key: dict(getattr(allocator, key)) for key in _IMPORTANCE}, "ranks": _config(model).rank_pattern}

    def restore(self, model: PeftModel, state: Mapping[str, Any]) -> None:
        """Restore the importances and ranks; the state comes from the CPU."""
        for key in _IMPORTANCE:
            values = {name: value.to(model.device) for name, value in state[key].items()}
            setattr(model.base_model.rankallocator, key, values)
        _config(model).rank_pattern = state["ranks"]

    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """B · diag(E)·A without the pruned ranks."""
        (name,) = layer.active_adapters
        scale = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
        values = layer.lora_E[name][:, 0]
        kept = values != 0
        a, b = layer.lora_A[name][kept] * values[kept, None], layer.lora_B[name][:, kept] * scale
        return Delta(array(a), array(b))


def _config(model: PeftModel) -> Any:  # noqa: ANN401 - PEFT carries no types
    return model.peft_config["default"]


METHOD = AdaLora()
