"""Full fine-tuning: all weights of the base are trained, through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_export.adapters.shapes import Floats, Folded, Merged
from edgetune_runtime.errors import IncompatibleError, VerificationError

from .common.base import Checkpoint, Method, MethodOptions, O, TrainedModules, rate_factor, trainable
from .common.peft import array, no_grad

if TYPE_CHECKING:
    import torch
    from edgetune_export.architectures.shape import BaseShape, SizedModule
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


class FullOptions(MethodOptions):
    """Options of full fine-tuning."""

    learning_rate_factor: float = rate_factor(0.03)


class OwnWeights(Method[O]):
    """A method that trains parameters of the base itself: those that `chosen` returns."""

    trains_base = True
    adds_parameters = False

    def shapes(self, options: O) -> tuple[str, ...]:
        """A full model."""
        return ("merged",)

    def trained_parameters(self, trained: TrainedModules, options: O) -> int:
        """All parameters of the base that are in memory."""
        return trained.base.loaded_parameters

    def trained_modules(self, base: BaseShape, options: O) -> list[SizedModule]:
        """Those of the layers that gradients reach."""
        first = base.layers - self.trained_layers(base, options)
        return [module for module in base.modules if module.layer >= first]

    def chosen(self, base: PreTrainedModel, options: O) -> set[str]:
        """Names of the parameters to train."""
        return {name for name, _ in base.named_parameters()}

    def attach(self, base: PreTrainedModel, options: O, steps: int) -> torch.nn.Module:
        """Unfreeze the chosen parameters of `base` and freeze the others."""
        chosen = self.chosen(base, options)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in chosen)
        model: torch.nn.Module = base
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the trained parameters as safetensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(model)}
        save_file(tensors, folder / WEIGHTS)

    def detach(self, model: torch.nn.Module) -> None:
        """Freeze the parameters again; their values stay as trained."""
        model.requires_grad_(requires_grad=False)
        model.zero_grad(set_to_none=True)

    @contextmanager
    def loaded(self, checkpoint: Checkpoint) -> Iterator[torch.nn.Module]:
        """The base with the trained parameters; its own are restored afterwards."""
        parameters = dict(checkpoint.base.named_parameters())
        kept = {}
        try:
            with no_grad():
                for name in _names(checkpoint):
                    kept[name] = parameters[name].detach().clone()
                    parameters[name].copy_(_tensor(checkpoint.folder, name))
            yield checkpoint.base
        finally:
            with no_grad():
                for name, values in kept.items():
                    parameters[name].copy_(values)

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The trained parameters as stored in the folder."""
        names = _names(checkpoint)
        return Merged(checkpoint.name, self.name, {name: partial(_values, checkpoint.folder, name) for name in names})


def _names(checkpoint: Checkpoint) -> list[str]:
    """The names of the trained parameters. Raises IncompatibleError if the base lacks one."""
    from safetensors import SafetensorError, safe_open

    path = checkpoint.folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise VerificationError(f"{path} is damaged: {error}", "train it again") from error
    unknown = sorted(set(names) - {name for name, _ in checkpoint.base.named_parameters()})
    if unknown:
        raise IncompatibleError(f"the base has no parameter {unknown[0]}", "use the base that was trained")
    return names


def _tensor(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _values(folder: Path, name: str) -> Floats:
    return array(_tensor(folder, name))


class Full(OwnWeights[FullOptions]):
    """All weights are trained: use it as the reference, or for a single task when no adapter is good enough."""

    options = FullOptions


METHOD = Full()
