"""Bottleneck adapters: a small trained network after or parallel to the blocks of each layer.

Houlsby: Houlsby et al. 2019, arXiv:1902.00751. Pfeiffer: Pfeiffer et al. 2020, arXiv:2005.00247. Parallel: He et al.
2021, arXiv:2110.04366. The options are named as in the AdapterHub library, which is not used because it does not
support transformers 5. Its Pfeiffer adapter can come after a layer's norm; here all adapters are applied to the block's
output or input, before the residual is added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from edgetune_export.adapters.shapes import Activation, Bottleneck, Floats, Folded, Tensors
from edgetune_runtime.errors import IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.wording import first_line
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .common.base import Checkpoint, Method, MethodOptions, TrainedModules, dense_parameters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .common.bottleneck import Bottlenecked

WEIGHTS_NAME = "bottlenecks.safetensors"
OPTIONS_NAME = "bottlenecks.json"
# The blocks of a layer that get a bottleneck, and whether it reads their output or input.
_PLACES: dict[str, dict[str, Literal["output", "input"]]] = {
    "houlsby": {"self_attn": "output", "mlp": "output"},
    "pfeiffer": {"mlp": "output"},
    "parallel": {"mlp": "input"},
}
_ARRAYS = tuple(field.name for field in fields(Bottleneck) if field.name not in {"activation", "reads"})
_AGAIN = "train or copy the adapter again"


class BottleneckOptions(MethodOptions):
    """Options of bottleneck adapters, named as in AdapterHub."""

    kind: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="houlsby: after attention and after the MLP; pfeiffer: after the MLP; parallel: beside the MLP.",
    )
    reduction_factor: float = Field(16, ge=1, description="The base's hidden size divided by that of the bottleneck.")
    bottleneck_size: PositiveInt | None = Field(
        None, description="Hidden size of the bottleneck; overrides reduction_factor."
    )
    non_linearity: Activation = Field(
        "relu", description="Activation between the down and up projections; gelu is the exact GELU."
    )
    scaling: PositiveFloat = Field(1.0, description="Factor on the adapter's output; He et al. use 4 for parallel.")


class BottleneckMethod(Method[BottleneckOptions]):
    """A small network after or parallel to a layer's blocks: use it with ONNX, when LoRA is not enough."""

    takes_scale = True
    takes_recurrent_layers = False
    options = BottleneckOptions

    def shapes(self, options: BottleneckOptions) -> tuple[str, ...]:
        """The networks' weights; they cannot be expressed as a change of the base's weights."""
        return ("tensors",)

    def trained_parameters(self, trained: TrainedModules, options: BottleneckOptions) -> int:
        """Both layers of each network, with their biases."""
        size = _size(trained.base.hidden, options)
        network = dense_parameters(trained.base.hidden, size) + dense_parameters(size, trained.base.hidden)
        return trained.base.layers * len(_PLACES[options.kind]) * network

    def attach(self, base: PreTrainedModel, options: BottleneckOptions, steps: int) -> Bottlenecked:
        """Hook bottlenecks, which add 0 at first, onto `base`. Raises UsageError if it has no such blocks."""
        from .common.bottleneck import Bottlenecked, BottleneckModule

        width = base.config.hidden_size
        size = _size(width, options)
        activation, scaling = options.non_linearity, options.scaling
        places = _places(base, options.kind)
        parts = {block: BottleneckModule(width, size, activation, reads, scaling) for block, reads in places.items()}
        return Bottlenecked(base, parts, options)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the weights, with the scaling in `up` and `up_bias`, and the options."""
        tuned = cast("Bottlenecked", model)
        arrays = {f"{block}.{name}": getattr(item, name) for block, item in tuned.folded().items() for name in _ARRAYS}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, folder / WEIGHTS_NAME)
        (folder / OPTIONS_NAME).write_text(json.dumps(tuned.options.model_dump(mode="json")), encoding="utf-8")

    def detach(self, model: torch.nn.Module) -> None:
        """Remove the hooks from the base."""
        cast("Bottlenecked", model).detach()

    @contextmanager
    def loaded(self, checkpoint: Checkpoint) -> Iterator[Bottlenecked]:
        """The folder's bottlenecks, times the scale, on the base."""
        from .common.bottleneck import Bottlenecked, BottleneckModule

        options, bottlenecks = _read(checkpoint.folder)
        _check_fit(checkpoint, bottlenecks)
        parts = {block: BottleneckModule.of(item, checkpoint.scale) for block, item in bottlenecks.items()}
        model = Bottlenecked(checkpoint.base, parts, options)
        try:
            yield model.eval()
        finally:
            model.detach()

    def fold(self, checkpoint: Checkpoint, shape: str) -> Folded:
        """The bottleneck of each block, read from the folder; `up` includes the scaling."""
        _, bottlenecks = _read(checkpoint.folder)
        _check_fit(checkpoint, bottlenecks)
        return Tensors(checkpoint.name, self.name, bottlenecks=bottlenecks)


def _size(width: int, options: BottleneckOptions) -> int:
    """The hidden size of a bottleneck for a base of this width."""
    return options.bottleneck_size or max(1, int(width // options.reduction_factor))


def _places(base: PreTrainedModel, kind: str) -> dict[str, Literal["output", "input"]]:
    """The names of the base's blocks that get a bottleneck, and whether it reads their output or input."""
    sides = _PLACES[kind]
    places = {}
    for name, _ in base.named_modules():
        match = re.fullmatch(r"(?:.+\.)?layers\.\d+\.(\w+)", name)
        if match and match[1] in sides:
            places[name] = sides[match[1]]
    if not places:
        message = f"{type(base).__name__} has no {' or '.join(sides)} in its layers for a bottleneck"
        raise UsageError(message, "use another method, such as lora")
    return places


def _read(folder: Path) -> tuple[BottleneckOptions, dict[str, Bottleneck]]:
    """The options and the bottlenecks by block name, as written by `save`."""
    path = folder / WEIGHTS_NAME
    try:
        options = BottleneckOptions.model_validate_json((folder / OPTIONS_NAME).read_bytes())
        arrays: Mapping[str, Floats] = load_file(path)
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in sorted(arrays))
        return options, {block: _bottleneck(block, arrays, options) for block in blocks}
    except FileNotFoundError as error:
        message = f"{folder} is not a bottleneck adapter: {OPTIONS_NAME} or {WEIGHTS_NAME} is missing"
        raise NotFoundError(message, "give a folder written by a training") from error
    except (ValidationError, SafetensorError, KeyError) as error:
        message = f"the bottleneck adapter in {folder} is damaged: {first_line(error)}"
        raise VerificationError(message, _AGAIN) from error


def _bottleneck(block: str, arrays: Mapping[str, Floats], options: BottleneckOptions) -> Bottleneck:
    values = {name: arrays[f"{block}.{name}"] for name in _ARRAYS}
    reads = _PLACES[options.kind][block.rpartition(".")[2]]
    return Bottleneck(**values, activation=options.non_linearity, reads=reads)


def _check_fit(checkpoint: Checkpoint, bottlenecks: Mapping[str, Bottleneck]) -> None:
    """Raise IncompatibleError if the base lacks a block or has another size."""
    width = checkpoint.base.config.hidden_size
    names = {name for name, _ in checkpoint.base.named_modules()}
    for block, item in bottlenecks.items():
        size = item.down.shape[0]
        shapes = [item.down.shape, item.down_bias.shape, item.up.shape, item.up_bias.shape]
        if block not in names or shapes != [(size, width), (size,), (width, size), (width,)]:
            message = f"adapter {checkpoint.name!r} has a bottleneck at {block} that does not fit the base"
            raise IncompatibleError(message, "use the base that the adapter was trained on")


METHOD = BottleneckMethod()
