"""Int8 matrix products with frozen weights, forward and backward, for training on x86 processors without bf16 support.

Similar to SwitchBack (Wortsman et al. 2023, arXiv:2304.13013), but with gradients of inputs in int8 and gradients of
trained weights in float32: each row of activations or gradients is rounded to 8 bits with its own scale, each row of
weights to 7 bits. oneDNN computes the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from edgetune_export import architectures
from edgetune_runtime.errors import UsageError
from torch.autograd.function import once_differentiable

from .checkpointing import layers_of

# oneDNN expects unsigned activations: -127 to 127 around this zero point.
_ZERO = 128
_MOST = 127
# AVX2 adds two 8-bit products in 16 bits and saturates: 2 · 255 · 64 still fits.
_MOST_WEIGHT = 64
# Avoids dividing by zero for rows of zeros.
_TINY = 1e-20
# oneDNN optimizes the packing for about this many rows; other numbers of rows give the same results.
_ROWS = 2048


class PackedLinear:
    """A frozen linear layer in int8 for forward and backward: 2 bytes per weight in addition to the float32 weights."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._forward, self._backward = _Packed(weight), _Packed(weight.t())

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Approximate rows·Wᵀ + bias, float32 [rows, outputs], from float32 [rows, inputs]; not differentiable."""
        out = self._forward.product(rows)
        return out if self._bias is None else out.add_(self._bias)

    def inputs(self, grad: torch.Tensor) -> torch.Tensor:
        """Approximate grad·W, float32 [rows, inputs], from float32 [rows, outputs]; not differentiable."""
        return self._backward.product(grad)


class _Packed:
    """A matrix [outputs, inputs] in 7 bits with a scale per output."""

    def __init__(self, weight: torch.Tensor) -> None:
        outputs, inputs = weight.shape
        self._scale = weight.abs().amax(1).div_(_MOST_WEIGHT).clamp_(min=_TINY)
        rounded = (weight / self._scale[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded.contiguous(), [_ROWS, inputs])
        self._zeros = torch.zeros(outputs, dtype=torch.int32)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        # torch's infinity norm is several times slower than abs().amax().
        scale = rows.abs().amax(-1, keepdim=True).div_(_MOST).clamp_(min=_TINY)
        # The conversion truncates, so adding 0.5 rounds. A value that is not finite makes the scale and the row so.
        rounded = (rows / scale).add_(_ZERO + 0.5).to(torch.uint8)
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, _ZERO, self._weight, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.mul_(scale)


PackedLayers = Mapping[torch.nn.Module, PackedLinear]


@contextmanager
def in_int8(model: torch.nn.Module) -> Iterator[PackedLayers]:
    """Compute the frozen linear modules in the layers of `model` in int8 in training mode, also inside PEFT's layers.

    The output layer and evaluation mode stay in float32. Yields the packed modules, which use 2 bytes per weight until
    the block ends. UsageError if no frozen linear module is found.
    """
    packed: dict[torch.nn.Module, PackedLinear] = {module: PackedLinear(module) for module in _frozen(model)}
    if not packed:
        raise UsageError("training.precision is int8, but the base has no frozen linear layers", "set it to fp32")
    for module, weights in packed.items():
        module.forward = partial(_forward, module, weights)  # type: ignore[arg-type]  # all are linear
    try:
        yield packed
    finally:
        for module in packed:
            del module.forward


def _frozen(model: torch.nn.Module) -> list[torch.nn.Linear]:
    excluded = {name for architecture in architectures.known().values() for name in architecture.not_in_int8}
    return [
        module
        for layer in layers_of(model)
        for name, module in layer.named_modules()
        # An instance attribute `forward` was set by other code, such as a hook of accelerate.
        if type(module) is torch.nn.Linear
        and "forward" not in vars(module)
        and name.removesuffix(".base_layer") not in excluded
        and not any(p.requires_grad for p in module.parameters())
    ]


def _forward(module: torch.nn.Linear, packed: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    if not module.training:
        return torch.nn.Linear.forward(module, x)
    out: torch.Tensor = _Int8Linear.apply(x.flatten(0, -2), packed)  # type: ignore[no-untyped-call]
    # PEFT's layers add to it in place, which autograd forbids for views created inside a Function.
    return out.view(*x.shape[:-1], -1)


class _Int8Linear(torch.autograd.Function):
    """The outputs of a packed layer, with the gradient for its inputs; keeps no activations for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, packed: PackedLinear) -> torch.Tensor:  # noqa: ANN401 - torch gives it no public type
        ctx.packed = packed
        return packed.outputs(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401 - as above
        return ctx.packed.inputs(grad), None
