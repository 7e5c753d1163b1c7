"""LoRA, with rsLoRA, LoRA+ and rank and alpha per module as options, through PEFT.

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. LoRA+: Hayou et al. 2024,
arXiv:2402.12354.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from edgetune_export.adapters.fold import find_weights, fold_peft, peft_tensors, read_config
from edgetune_export.adapters.patterns import matching, of_key
from edgetune_runtime.errors import IncompatibleError, UsageError
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from .common.base import TrainedModules, trainable, with_defaults
from .common.lora_checkpoint import LoraCheckpoint
from .common.peft import ALL_LINEAR, AUTO, LowRankOptions, targets_among
from .common.peft_folder import check_peft_folder

if TYPE_CHECKING:
    import torch
    from edgetune_export.architectures.shape import BaseShape, SizedModule


def _share(value: object) -> object:
    """A percentage as a fraction; anything else is left for pydantic to check."""
    text = value.strip() if isinstance(value, str) else ""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else value
    except ValueError:
        return value


Share = Annotated[float, BeforeValidator(_share, json_schema_input_type=float | str), Field(ge=0, le=1)]


class LoraOptions(LowRankOptions):
    """Options of LoRA, named as in PEFT; `rank`, `alpha` and `dropout` are accepted too."""

    target_modules: str | tuple[str, ...] = Field(
        default=ALL_LINEAR,
        description="Modules to adapt: all-linear, a list of names such as [q_proj, v_proj], or auto, which chooses "
        "modules and a rank of at most r by their benefit and cost (docs/placement.md).",
    )
    max_decode_overhead: Share = Field(
        default=0.1,
        description="Share of decode speed that the adapter may cost, such as 10% or 0.1; used by auto only.",
    )
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(r) instead of alpha / r, which is more stable for high ranks."
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Ranks of single modules, by module name or regular expression."
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Alphas of single modules, by module name or regular expression."
    )
    loraplus_lr_ratio: float = Field(
        default=1.0, gt=0, description="Learning rate of B as a multiple of A's; LoRA+ uses about 16."
    )

    @model_validator(mode="after")
    def _no_patterns_of_auto(self) -> LoraOptions:
        if self.is_auto and (self.rank_pattern or self.alpha_pattern):
            raise ValueError("target_modules: auto uses one rank for all modules; remove rank_pattern, alpha_pattern")
        return self

    @property
    def is_auto(self) -> bool:
        """Whether the build chooses modules and rank."""
        return self.target_modules == AUTO

    def placed(self, target_modules: str | tuple[str, ...], r: int) -> LoraOptions:
        """The options for these modules and this rank, with alpha adjusted so that the scaling stays the same."""
        alpha = alpha_at(self.lora_alpha, r / self.r, use_rslora=self.use_rslora)
        return self.model_copy(update={"target_modules": target_modules, "r": r, "lora_alpha": alpha})


def alpha_at(alpha: float, share: float, *, use_rslora: bool) -> float:
    """The alpha that keeps the scaling at `share` times the rank, by whose square root rsLoRA divides."""
    return alpha * (math.sqrt(share) if use_rslora else share)


L = TypeVar("L", bound=LoraOptions)


class Lora(LoraCheckpoint[L]):
    """A low-rank product B·A beside each weight matrix: use it first; exact in both formats, fastest to switch."""

    options = LoraOptions
    peft_type = "LORA"
    trains_on_grid = True
    takes_start = True

    def wrote(self, config: Mapping[str, Any]) -> bool:
        """A plain LoRA; PEFT saves DoRA and aLoRA with the same type, but they are separate methods here."""
        plain = not config.get("use_dora") and not config.get("alora_invocation_tokens")
        return super().wrote(config) and plain

    def check(self, options: L, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Raise UsageError for a target module that the base lacks, and for a pattern that matches none of them."""
        super().check(options, linear, shapes)
        _check_patterns({module.name for module in targets_among(linear, options)}, options)

    def trained_modules(self, base: BaseShape, options: L) -> list[SizedModule]:
        """The target modules. Raises UsageError for `auto` on other modules than LLaMA's."""
        if options.is_auto and base.architecture.has_other_modules:
            names = sorted({module.name.rpartition(".")[2] for module in base.modules})
            message = "target_modules: auto does not support the modules of this base"
            raise UsageError(message, f"list modules, of {', '.join(names)}, or use all-linear")
        return super().trained_modules(base, options)

    def shipped_ranks(self, modules: Sequence[SizedModule], options: L) -> list[int]:
        """The rank of each module: that of the first pattern that matches it, else `r`."""
        names = [module.name for module in modules]
        matched = matching([of_key(pattern) for pattern in options.rank_pattern], names, "rank_pattern")
        ranks = dict.fromkeys(names, options.r)
        for rank, adapted in reversed([*zip(options.rank_pattern.values(), matched, strict=True)]):
            ranks |= dict.fromkeys(adapted or (), rank)
        return list(ranks.values())

    def trained_parameters(self, trained: TrainedModules, options: L) -> int:
        """Both factors of each module, with its own rank."""
        return trained.low_rank_values

    def check_start(self, folder: Path, options: L) -> None:
        """Raise IncompatibleError if the adapter has other ranks or scales, and what `find_weights` raises."""
        if difference := other_option(folder, options):
            raise _no_start(folder, difference)
        find_weights(folder)

    def start_from(self, model: Any, folder: Path, options: L) -> None:  # noqa: ANN401 - PEFT's, which wraps its base
        """Load the factors of an adapter with the same ranks, scales and modules."""
        import torch
        from peft import set_peft_model_state_dict

        check_peft_folder(folder, model.get_base_model())
        self.check_start(folder, options)
        # Refuses all but LoRA, such as trained embeddings, which PEFT would load into the base.
        fold_peft(folder, folder.name)
        tensors = {name: torch.from_numpy(values) for name, values in peft_tensors(folder).items()}
        try:
            result = set_peft_model_state_dict(model, tensors)
        except RuntimeError as error:
            raise _no_start(folder, "other sizes") from error
        if result.unexpected_keys or any(".lora_" in key for key in result.missing_keys):
            raise _no_start(folder, "other modules")

    def parameter_groups(self, model: torch.nn.Module, options: L, learning_rate: float) -> list[dict[str, Any]]:
        """A at the learning rate, B at `loraplus_lr_ratio` times it (LoRA+, section 4)."""
        named, rate = trainable(model), learning_rate * options.learning_rate_factor
        return [
            {"params": [p for name, p in named if "lora_B" not in name], "lr": rate},
            {"params": [p for name, p in named if "lora_B" in name], "lr": rate * options.loraplus_lr_ratio},
        ]


def other_option(folder: Path, options: LoraOptions) -> str:
    """The first option that a saved LoRA has with another value, as text; empty if there is none."""
    saved = read_config(folder)
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        value, option = saved.get(key), getattr(options, key)
        if (value or option) and value != option:
            return f"{key} {value} and not {option}"
    return ""


def _no_start(folder: Path, difference: str) -> IncompatibleError:
    message = f"the adapter in {folder} has {difference}, so training cannot start from it"
    return IncompatibleError(message, "give the method the options of that adapter, or remove start_from")


def _check_patterns(adapted: set[str], options: LoraOptions) -> None:
    names = sorted({name.rpartition(".")[2] for name in adapted})
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = list(getattr(options, key))
        modules = matching([of_key(pattern) for pattern in patterns], sorted(adapted), key)
        for pattern, matched in zip(patterns, modules, strict=True):
            if not matched:
                remedy = f"use one of {', '.join(names)}, or a regular expression that matches full module names"
                raise UsageError(f"{key} {pattern!r} matches no adapted module", remedy)


class RsLora(Lora[LoraOptions]):
    """LoRA whose update keeps its size at high ranks: use it for ranks of 32 and more."""

    variant = "rslora"
    options = with_defaults(LoraOptions, use_rslora=True, lora_alpha=8)


class LoraPlus(Lora[LoraOptions]):
    """LoRA that learns in fewer steps: use it when you can afford few epochs only."""

    variant = "loraplus"
    options = with_defaults(LoraOptions, loraplus_lr_ratio=16.0, learning_rate_factor=0.2)


METHOD = Lora[LoraOptions]()
VARIANTS = (RsLora(), LoraPlus())
