"""Base classes and helpers of the methods that train through PEFT: attach, save, load, merge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from edgetune_export import architectures
from edgetune_export.adapters.shapes import Delta, Floats, Folded, LowRank, Merged
from edgetune_export.architectures.base import OUTPUT_LAYER
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.wording import nearest
from pydantic import AliasChoices, Field, PositiveInt

from .base import Checkpoint, Method, MethodOptions, O, TrainedModules
from .peft_folder import load_peft_folder

if TYPE_CHECKING:
    import torch
    from edgetune_export.architectures.shape import BaseShape, SizedModule
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
AUTO = "auto"
"""Modules that the build chooses."""

Rank = Annotated[PositiveInt, Field(validation_alias=AliasChoices("r", "rank"), description="Rank of the update.")]
"""The option `r`."""
Alpha = Annotated[
    float,
    Field(
        gt=0,
        validation_alias=AliasChoices("lora_alpha", "alpha"),
        description="The update is scaled by alpha / r.",
    ),
]
"""The option `lora_alpha`."""
Dropout = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        validation_alias=AliasChoices("lora_dropout", "dropout"),
        description="Dropout rate of the adapter's inputs.",
    ),
]
"""The option `lora_dropout`."""


class TargetOptions(MethodOptions):
    """Options of methods that change linear modules."""

    target_modules: str | tuple[str, ...] = Field(
        ALL_LINEAR, description="Modules to adapt: all-linear, or a list of names such as [q_proj, v_proj]."
    )


class LowRankOptions(TargetOptions):
    """Options of methods that train a LoRA, named as in PEFT."""

    r: Rank = 16
    lora_alpha: Alpha = 32
    lora_dropout: Dropout = 0.0


class PeftMethod(Method[O]):
    """A PEFT method that changes linear modules, which `peft_type` selects."""

    def check(self, options: O, linear: Sequence[SizedModule], shapes: Collection[str]) -> None:
        """Raise UsageError for a target module that the base lacks, and if there is none."""
        assert isinstance(options, TargetOptions)
        if not options.target_modules:
            raise UsageError("target_modules names no module", "list some, or use all-linear")
        check_targets({module.name for module in linear}, options.target_modules)

    def trained_modules(self, base: BaseShape, options: O) -> list[SizedModule]:
        """The target modules."""
        assert isinstance(options, TargetOptions)
        return targets_among(base.linear_modules, options)

    def trained_parameters(self, trained: TrainedModules, options: O) -> int:
        """Those of all target modules."""
        return sum(self.trained_parameters_in(module, options) for module in trained.modules)

    @abstractmethod
    def trained_parameters_in(self, module: SizedModule, options: O) -> int:
        """How many parameters of a target module training changes."""

    def peft_settings(self, options: O, steps: int) -> Mapping[str, Any]:
        """PEFT's settings, for a training of `steps` steps, that are not options with the same name."""
        return {}

    def attach(self, base: PreTrainedModel, options: O, steps: int) -> PeftModel:
        """Add PEFT's trainable parts in float32 to `base`."""
        from peft import get_peft_model

        return get_peft_model(base, peft_config(self.peft_type, base, options, self.peft_settings(options, steps)))

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write PEFT's folder."""
        save_peft(model, folder)

    def detach(self, model: PeftModel) -> None:
        """Remove PEFT's layers from the base."""
        model.unload()

    def loaded(self, checkpoint: Checkpoint) -> AbstractContextManager[torch.nn.Module]:
        """PEFT's model of the checkpoint on the base."""
        return peft_model(checkpoint)


class WeightMethod(PeftMethod[O]):
    """A PEFT method that changes the weights of linear modules and can be merged into them."""

    takes_scale = True
    takes_encoders = True

    def shapes(self, options: O) -> tuple[str, ...]:
        """Low-rank by `factors`, or merged."""
        return ("low_rank", "merged")

    @abstractmethod
    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """The update of one layer's weights as an exact low-rank product."""

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The low-rank product of each layer, or the merged weights."""
        with peft_model(checkpoint if shape == "merged" else replace(checkpoint, scale=1.0)) as model:
            layers = dict(tuned_layers(model))
            if shape == "merged":
                return Merged(checkpoint.name, self.name, merged_weights(layers))
            with no_grad():
                deltas = {module: self.factors(layer) for module, layer in layers.items()}
            return LowRank(
                checkpoint.name, self.name, {module: delta for module, delta in deltas.items() if delta.rank}
            )


@contextmanager
def peft_model(checkpoint: Checkpoint) -> Iterator[PeftModel]:
    """PEFT's model of the checkpoint at its scale; the base is restored afterwards."""
    model = load_peft(checkpoint)
    if checkpoint.scale != 1.0:
        for _, layer in tuned_layers(model):
            scale_layer(layer, checkpoint.scale)
    try:
        yield model
    finally:
        model.unload()


def save_peft(model: PeftModel, folder: Path, **options: object) -> None:
    """Write PEFT's folder, without the model card, which takes longer than the weights of a small adapter."""
    model.create_or_update_model_card = lambda _folder: None
    model.save_pretrained(str(folder), save_embedding_layers=False, **options)


def load_peft(checkpoint: Checkpoint) -> PeftModel:
    """PEFT's model of the checkpoint on the base, in eval mode. Raises what `load_peft_folder` raises."""
    return load_peft_folder(checkpoint.folder, checkpoint.base).eval()


def scale_layer(layer: Any, scale: float) -> None:  # noqa: ANN401 - as above
    """Multiply a layer's update by `scale`."""
    if hasattr(layer, "scale_layer"):
        layer.scale_layer(scale)
    else:
        # VeRA layers have no scale_layer, so scale the factor of each output.
        for factors in layer.vera_lambda_b.values():
            factors.data.mul_(scale)


def tuned_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT changes, with their names in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            yield name.removeprefix("base_model.model."), module


def merged_weights(layers: dict[str, Any]) -> dict[str, Callable[[], Floats]]:
    """The merged weights of each layer, computed on demand, even after the layers were removed from the base."""
    return {f"{name}.weight": partial(merged_parameter, layer) for name, layer in layers.items()}


def merged_parameter(layer: Any, name: str = "weight") -> Floats:  # noqa: ANN401 - as above
    """A layer's weights [rows, columns], or its bias, with the update merged in; the layer itself is not changed."""
    copy = deepcopy(layer)
    with no_grad():
        copy.merge()
    return array(getattr(copy.get_base_layer(), name))


def module_weight(base: PreTrainedModel, module: str) -> Floats:
    """The weights [rows, columns] of a linear module of the base. Raises IncompatibleError if there is none."""
    try:
        return array(base.get_submodule(module).weight)
    except AttributeError as error:
        message = f"the base has no linear module {module}"
        raise IncompatibleError(message, "use the base that the adapter was trained on") from error


def base_weight(layer: Any) -> Floats:  # noqa: ANN401 - as above
    """A layer's weights [rows, columns] without its update."""
    return array(layer.get_base_layer().weight)


def array(tensor: torch.Tensor) -> Floats:
    """A tensor as a float32 array."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def no_grad() -> Any:  # noqa: ANN401 - a context of torch's
    """torch.no_grad(), with torch imported on demand."""
    import torch

    return torch.no_grad()


def as_names(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """Target modules as a list of names."""
    return (target_modules,) if isinstance(target_modules, str) else target_modules


def peft_config(
    peft_type: str, base: PreTrainedModel, options: MethodOptions, settings: Mapping[str, Any]
) -> PeftConfig:
    """PEFT's configuration of a method: the options that PEFT has too, which have the same names, and `settings`."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    values = options.model_dump(include={field.name for field in fields(config_class)})
    if isinstance(options, TargetOptions):
        if options.target_modules != ALL_LINEAR:
            # PEFT would read any other string as a regular expression.
            values["target_modules"] = list(as_names(options.target_modules))
        else:
            # PEFT's own all-linear adapts fixed modules too, and saves names with which it cannot load (IA)3.
            linear = {name for name, module in base.named_modules() if type(module).__name__ == "Linear"}
            adapted = linear - _fixed_modules(base) - {OUTPUT_LAYER}
            values["target_modules"] = sorted({name.rpartition(".")[2] for name in adapted})
    # An encoder lacks methods that PEFT calls for CAUSAL_LM.
    task_type = "CAUSAL_LM" if base.can_generate() else None
    return config_class(**{"task_type": task_type, **values, **settings})


def is_target(module: str, target_modules: str | tuple[str, ...]) -> bool:
    """Whether PEFT adapts the linear module of this name; for all-linear, each but the output layer."""
    if target_modules in (ALL_LINEAR, AUTO):
        return module != OUTPUT_LAYER
    return any(module == target or module.endswith(f".{target}") for target in as_names(target_modules))


def targets_among(linear: Sequence[SizedModule], options: TargetOptions) -> list[SizedModule]:
    """The linear modules that PEFT adapts."""
    return [module for module in linear if is_target(module.name, options.target_modules)]


def _fixed_modules(base: PreTrainedModel) -> set[str]:
    """The linear modules that no adapter may change; none of an encoder."""
    return set(architectures.of_model_type(base.config.model_type).fixed_modules) if base.can_generate() else set()


def check_targets(linear: Collection[str], target_modules: str | tuple[str, ...]) -> None:
    """UsageError for a target that none of the linear modules `linear` is."""
    if target_modules not in (ALL_LINEAR, AUTO):
        check_names(linear, target_modules, "target_modules")


def check_names(linear: Collection[str], modules: str | tuple[str, ...], key: str) -> None:
    """UsageError for a name in the option `key` that none of the linear modules `linear` has."""
    for target in as_names(modules):
        if not any(is_target(name, (target,)) for name in linear):
            names = sorted({name.rpartition(".")[2] for name in linear})
            near = nearest(target, names)
            hint = f"did you mean {near!r}? Or " if near else ""
            all_of_them = "all-linear, or to " if key == "target_modules" else ""
            remedy = f"{hint}set {key} to {all_of_them}some of {', '.join(names)}"
            raise UsageError(f"the base has no module {target!r}", remedy)
