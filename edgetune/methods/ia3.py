"""(IA)3: trained factors on keys, values and inner activations of the feed-forward blocks, through PEFT.

(IA)3: Liu et al. 2022, arXiv:2205.05638. A scale s of the adapter turns each factor f into 1 + s·(f - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.shapes import Floats, Folded, Merged, Scaling, Tensors
from pydantic import Field

from .common.base import Checkpoint, rate_factor
from .common.peft import (
    ALL_LINEAR,
    PeftMethod,
    TargetOptions,
    array,
    as_names,
    check_names,
    is_target,
    merged_parameter,
    merged_weights,
    no_grad,
    peft_model,
    tuned_layers,
)

if TYPE_CHECKING:
    import torch
    from edgetune_export.architectures.shape import SizedModule
    from peft import PeftModel


class Ia3Options(TargetOptions):
    """Options of (IA)3, named as in PEFT; the default modules are those of the paper."""

    target_modules: str | tuple[str, ...] = Field(
        ("k_proj", "v_proj", "down_proj"), description="Modules to scale: all-linear, or a list of names."
    )
    feedforward_modules: str | tuple[str, ...] = Field(
        ("down_proj",), description="The target modules whose inputs are scaled instead of their outputs."
    )
    learning_rate_factor: float = rate_factor(10.0)


class Ia3(PeftMethod[Ia3Options]):
    """A factor per key, value and inner activation: use it for adapters of a few kB that cost no speed."""

    options = Ia3Options
    peft_type = "IA3"
    takes_scale = True

    def shapes(self, options: Ia3Options) -> tuple[str, ...]:
        """The factors themselves, or the weights times the factors."""
        return ("tensors", "merged")

    def check(self, options: Ia3Options, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Raise UsageError for a target or feed-forward module that the base lacks."""
        super().check(options, linear, shapes)
        check_names({module.name for module in linear}, options.feedforward_modules, "feedforward_modules")

    def trained_parameters_in(self, module: SizedModule, options: Ia3Options) -> int:
        """A factor per input of a feed-forward module, and per output of another."""
        return module.columns if is_target(module.name, options.feedforward_modules) else module.rows

    def peft_settings(self, options: Ia3Options, steps: int) -> Mapping[str, Any]:
        """The feed-forward modules; PEFT refuses names that are not targets."""
        names, targets = as_names(options.feedforward_modules), as_names(options.target_modules)
        return {"feedforward_modules": [name for name in names if ALL_LINEAR in targets or name in targets]}

    def parameter_groups(
        self, model: torch.nn.Module, options: Ia3Options, learning_rate: float
    ) -> list[dict[str, Any]]:
        """All factors, without weight decay: that would pull them to 0, but the neutral factor is 1."""
        groups = super().parameter_groups(model, options, learning_rate)
        return [{**group, "weight_decay": 0.0} for group in groups]

    @contextmanager
    def loaded(self, checkpoint: Checkpoint) -> Iterator[PeftModel]:
        """PEFT's model of the folder, with the adapter's scale applied to the factors."""
        with peft_model(replace(checkpoint, scale=1.0)) as model:
            if checkpoint.scale != 1.0:
                with no_grad():
                    for _, layer in tuned_layers(model):
                        _factors(layer).sub_(1).mul_(checkpoint.scale).add_(1)
            yield model

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The factors of each module, or its weights and bias times the factors."""
        if shape == "merged":
            with self.loaded(checkpoint) as model:
                layers = dict(tuned_layers(model))
                return Merged(checkpoint.name, self.name, {**merged_weights(layers), **_merged_biases(layers)})
        with peft_model(replace(checkpoint, scale=1.0)) as model:
            scalings = {
                name: Scaling(array(_factors(layer).flatten()), "input" if layer.is_feedforward else "output")
                for name, layer in tuned_layers(model)
            }
        return Tensors(checkpoint.name, self.name, scalings=scalings)


def _factors(layer: Any) -> torch.Tensor:  # noqa: ANN401 - PEFT carries no types
    factors: torch.Tensor = layer.ia3_l[layer.active_adapters[0]]
    return factors


def _merged_biases(layers: Mapping[str, Any]) -> dict[str, Callable[[], Floats]]:
    """The biases, which a factor on a module's outputs changes too."""
    return {
        f"{name}.bias": partial(merged_parameter, layer, "bias")
        for name, layer in layers.items()
        if layer.get_base_layer().bias is not None and not layer.is_feedforward
    }


METHOD = Ia3()
