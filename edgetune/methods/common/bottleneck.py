"""Bottleneck adapters in torch, attached to a base's blocks by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from edgetune_export.adapters.shapes import Activation, Bottleneck
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .base import MethodOptions

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
}


class BottleneckModule(nn.Module):
    """One bottleneck: scaling · (up·act(down·x + down_bias) + up_bias), in float32. A new one returns 0."""

    def __init__(
        self, width: int, size: int, activation: Activation, reads: Literal["output", "input"], scaling: float = 1.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation, self.reads, self.scaling = activation, reads, scaling
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    @classmethod
    def of(cls, folded: Bottleneck, scale: float) -> BottleneckModule:
        """The module of a folded bottleneck, scaled by `scale`."""
        part = cls(folded.down.shape[1], folded.down.shape[0], folded.activation, folded.reads, scale)
        values = (folded.down, folded.down_bias, folded.up, folded.up_bias)
        with torch.no_grad():
            for parameter, value in zip(part._values(), values, strict=True):
                parameter.copy_(torch.from_numpy(value))
        return part

    def folded(self) -> Bottleneck:
        """The current values; `up` and `up_bias` include the scaling."""
        down, down_bias, up, up_bias = (parameter.detach().float().cpu() for parameter in self._values())
        return Bottleneck(
            down.numpy(),
            down_bias.numpy(),
            (up * self.scaling).numpy(),
            (up_bias * self.scaling).numpy(),
            self.activation,
            self.reads,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The term that is added to the block's output."""
        added: torch.Tensor = self.up(_ACTIVATIONS[self.activation](self.down(x))) * self.scaling
        return added

    def _values(self) -> tuple[torch.Tensor, ...]:
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias


class Bottlenecked(nn.Module):
    """The base with a bottleneck at each of the given blocks, until `detach`; the base's own parameters are frozen."""

    def __init__(self, base: PreTrainedModel, parts: Mapping[str, BottleneckModule], options: MethodOptions) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.blocks, self.options = tuple(parts), options
        self.parts = nn.ModuleList(parts.values()).to(base.device)
        self._hooks = [base.get_submodule(block).register_forward_hook(_adding(part)) for block, part in parts.items()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as in the base
        """The base's forward pass with the bottlenecks."""
        return self.base(*args, **kwargs)

    def folded(self) -> dict[str, Bottleneck]:
        """The current values of each bottleneck, by block name."""
        return {
            block: cast(BottleneckModule, part).folded() for block, part in zip(self.blocks, self.parts, strict=True)
        }

    def detach(self) -> None:
        """Remove the bottlenecks from the base."""
        for hook in self._hooks:
            hook.remove()


def _adding(part: BottleneckModule) -> Callable[..., Any]:
    """A forward hook that adds `part` of a block's input or output to the output; attention returns a tuple."""

    def hook(_block: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:  # noqa: ANN401 - as above
        first = output[0] if isinstance(output, tuple) else output
        changed = first + part(inputs[0] if part.reads == "input" else first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
