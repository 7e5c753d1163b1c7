"""LoRA and its everyday forms (rsLoRA, LoRA+, rank and alpha per module), through PEFT.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. LoRA+: Hayou et al. 2024,
arXiv:2402.12354.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from edgetune_runtime.errors import UsageError
from pydantic import AliasChoices, Field, PositiveInt

from ._base import Options, trainable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class LoraOptions(Options):
    """Options of LoRA, by PEFT's names; `rank`, `alpha` and `dropout` are accepted as well."""

    r: PositiveInt = Field(16, validation_alias=AliasChoices("r", "rank"), description="Rank of the update.")
    lora_alpha: float = Field(
        32,
        gt=0,
        validation_alias=AliasChoices("lora_alpha", "alpha"),
        description="The update counts alpha / r (with use_rslora: alpha / sqrt(r)).",
    )
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("lora_dropout", "dropout"),
        description="Share of an update's inputs dropped in training.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r), steadier for large ranks.")
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Module name or regular expression -> its own rank."
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Module name or regular expression -> its own alpha."
    )
    target_modules: str | tuple[str, ...] = Field(
        ALL_LINEAR, description="Modules to adapt: all-linear, or names such as [q_proj, v_proj]."
    )
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="Learning rate of B as a multiple of A's; LoRA+ takes about 16."
    )


class Lora:
    """A low-rank update B·A beside each target module."""

    options = LoraOptions
    shapes = ("low_rank", "merged")

    def attach(self, base: PreTrainedModel, options: LoraOptions) -> PeftModel:
        """Add LoRA modules in float32 to `base`; UsageError names target modules or patterns that match nothing."""
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - torch only when training

        _check_names(base, options)
        config = LoraConfig(
            # PEFT's class for causal models asks them for what only these have.
            task_type="CAUSAL_LM" if base.can_generate() else None,
            r=options.r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            use_rslora=options.use_rslora,
            rank_pattern=dict(options.rank_pattern),
            alpha_pattern=dict(options.alpha_pattern),
            # PEFT takes any other string for a regular expression of the whole name.
            target_modules=ALL_LINEAR if options.target_modules == ALL_LINEAR else list(_targets(options)),
        )
        return get_peft_model(base, config)

    def parameter_groups(self, model: PeftModel, options: LoraOptions, learning_rate: float) -> list[dict[str, Any]]:
        """A at the learning rate, B at `loraplus_lr_ratio` times it (LoRA+, section 4)."""
        named = trainable(model)
        b_learning_rate = learning_rate * options.loraplus_lr_ratio
        return [
            {"params": [p for name, p in named if "lora_B" not in name], "lr": learning_rate},
            {"params": [p for name, p in named if "lora_B" in name], "lr": b_learning_rate},
        ]


def _targets(options: LoraOptions) -> tuple[str, ...]:
    return (options.target_modules,) if isinstance(options.target_modules, str) else options.target_modules


def _check_names(base: PreTrainedModel, options: LoraOptions) -> None:
    linear = {name for name, module in base.named_modules() if type(module).__name__ == "Linear"}
    adapted = linear
    if options.target_modules != ALL_LINEAR:
        known = sorted({name.rpartition(".")[2] for name in linear})
        of_target = {target: {name for name in linear if _ends_with(name, target)} for target in _targets(options)}
        for target, matched in of_target.items():
            if not matched:
                near = difflib.get_close_matches(target, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                remedy = f"{hint}target_modules: all-linear, or any of {', '.join(known)}"
                raise UsageError(f"the base has no module {target!r}", remedy)
        adapted = set().union(*of_target.values())
    names = sorted({name.rpartition(".")[2] for name in adapted})
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(options, key):
            if not any(_matches(pattern, name) for name in adapted):
                remedy = f"name one of {', '.join(names)}, or write a regular expression of whole module names"
                raise UsageError(f"{key} {pattern!r} matches no adapted module", remedy)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matches(pattern: str, name: str) -> bool:
    """As PEFT's get_pattern_key matches; False for what is no regular expression."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False


METHOD = Lora()
