"""What methods trained through PEFT share: attach, save, load, and the layers that were trained."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from edgetune_export.adapters.shapes import Delta, Floats, Folded, LowRank, Merged
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.wording import nearest
from pydantic import AliasChoices, Field

from .base import Checkpoint, Method, MethodOptions, O

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_ADAPTER = "default"


Dropout = Annotated[
    float,
    Field(ge=0, lt=1, validation_alias=AliasChoices("lora_dropout", "dropout"), description="Share of inputs dropped."),
]
"""The option `lora_dropout`."""


class TargetOptions(MethodOptions):
    """Options of methods that change linear modules."""

    target_modules: str | tuple[str, ...] = Field(
        ALL_LINEAR, description="Modules to adapt: all-linear, or names such as [q_proj, v_proj]."
    )


class PeftMethod(Method[O]):
    """A method of PEFT's: `config` says which."""

    @abstractmethod
    def config(self, base: PreTrainedModel, options: O, steps: int) -> PeftConfig:
        """PEFT's configuration of a training of so many steps."""

    def attach(self, base: PreTrainedModel, options: O, steps: int) -> PeftModel:
        """Add PEFT's trainable parts in float32 to `base`."""
        from peft import get_peft_model  # noqa: PLC0415 - torch only when training

        if isinstance(options, TargetOptions):
            check_targets(base, options.target_modules)
        return get_peft_model(base, self.config(base, options, steps))

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write PEFT's folder."""
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def detach(self, model: PeftModel) -> None:
        """Take PEFT's layers off the base."""
        model.unload()

    @contextmanager
    def loaded(self, checkpoint: Checkpoint) -> Iterator[torch.nn.Module]:
        """PEFT's own model of the folder, on the base."""
        with peft_model(checkpoint) as model:
            yield model


class WeightMethod(PeftMethod[O]):
    """A method of PEFT's that changes the weights of linear modules, and can be merged into them."""

    takes_scale = True
    takes_encoders = True

    def shapes(self, options: O) -> tuple[str, ...]:
        """A product where `factors` gives one."""
        return ("low_rank", "merged")

    @abstractmethod
    def factors(self, layer: Any) -> Delta:  # noqa: ANN401 - PEFT carries no types
        """The change of one layer's weights as a product, exactly."""

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The product of each layer, or the merged weights."""
        with peft_model(checkpoint) as model:
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
    """The checkpoint, times its scale, on the base, which is given back as it was."""
    model = load_peft(checkpoint)
    if checkpoint.scale != 1.0:
        for _, layer in tuned_layers(model):
            scale_layer(layer, checkpoint.scale)
    try:
        yield model
    finally:
        model.unload()


def load_peft(checkpoint: Checkpoint) -> PeftModel:
    """PEFT's model of the checkpoint on the base, to be evaluated; IncompatibleError when PEFT cannot load it."""
    from peft import PeftModel  # noqa: PLC0415 - slow to import

    try:
        model = PeftModel.from_pretrained(checkpoint.base, str(checkpoint.folder))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompatibleError(f"PEFT cannot load {checkpoint.folder}: {reason}", "save the adapter again") from error
    return model.eval()


def scale_layer(layer: Any, scale: float) -> None:  # noqa: ANN401 - as above
    """Let what a layer learned count `scale` times."""
    if hasattr(layer, "scale_layer"):
        layer.scale_layer(scale)
    else:
        # VeRA has no scale; the factor of each output takes it.
        for factors in layer.vera_lambda_b.values():
            factors.data.mul_(scale)


def tuned_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT changes, by their names in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - slow to import

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            yield name.removeprefix("base_model.model."), module


def merged_weights(layers: dict[str, Any]) -> dict[str, Callable[[], Floats]]:
    """The whole weights of each layer, computed when they are called for; the layers may be taken off their base."""
    return {f"{name}.weight": partial(merged_weight, layer) for name, layer in layers.items()}


def merged_weight(layer: Any) -> Floats:  # noqa: ANN401 - as above
    """A layer's weights [rows, columns] with what it learned merged in; the layer stays as it is."""
    copy = deepcopy(layer)
    with no_grad():
        copy.merge()
    return array(copy.get_base_layer().weight)


def module_weight(base: PreTrainedModel, module: str) -> Floats:
    """The weights [rows, columns] of a linear module of the base; IncompatibleError when it has none of that name."""
    try:
        return array(base.get_submodule(module).weight)
    except AttributeError as error:
        message = f"the base has no linear module {module}"
        raise IncompatibleError(message, "give the base that the adapter was trained on") from error


def base_weight(layer: Any) -> Floats:  # noqa: ANN401 - as above
    """A layer's weights [rows, columns] without what it learned."""
    return array(layer.get_base_layer().weight)


def array(tensor: torch.Tensor) -> Floats:
    """A tensor's values."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def no_grad() -> Any:  # noqa: ANN401 - a context of torch's
    """A context in which torch keeps no gradients."""
    import torch  # noqa: PLC0415 - torch only when training or exporting

    return torch.no_grad()


def peft_targets(target_modules: str | tuple[str, ...]) -> str | list[str]:
    """Target modules as PEFT takes them: any other string would be a regular expression of the whole name."""
    return ALL_LINEAR if target_modules == ALL_LINEAR else list(as_names(target_modules))


def as_names(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """Target modules as a list of names."""
    return (target_modules,) if isinstance(target_modules, str) else target_modules


def lora_config(base: PreTrainedModel, options: Any, **more: Any) -> LoraConfig:  # noqa: ANN401 - PEFT's own arguments
    """PEFT's configuration of a LoRA from the options that all its kin have, and `more` of its arguments."""
    from peft import LoraConfig  # noqa: PLC0415 - torch only when training

    return LoraConfig(
        task_type=task_type(base),
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=peft_targets(options.target_modules),
        **more,
    )


def task_type(base: PreTrainedModel) -> str | None:
    """PEFT's class for causal models asks them for what only these have."""
    return "CAUSAL_LM" if base.can_generate() else None


def check_targets(base: PreTrainedModel, target_modules: str | tuple[str, ...]) -> set[str]:
    """The names of the linear modules that `target_modules` means; UsageError names those that the base lacks."""
    linear = {name for name, module in base.named_modules() if type(module).__name__ == "Linear"}
    if target_modules == ALL_LINEAR:
        return linear
    known = sorted({name.rpartition(".")[2] for name in linear})
    adapted: set[str] = set()
    for target in as_names(target_modules):
        matched = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matched:
            near = nearest(target, known)
            hint = f"did you mean {near!r}? " if near else ""
            remedy = f"{hint}target_modules: all-linear, or any of {', '.join(known)}"
            raise UsageError(f"the base has no module {target!r}", remedy)
        adapted |= matched
    return adapted


def matches(pattern: str, name: str) -> bool:
    """As PEFT's get_pattern_key matches; False for what is no regular expression."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False
