"""Trains merged models through the rounding of their weights, so that they keep the base's quantization.

A LoRA layer computes with W + s·B·A rounded to the grid of the base's quantized tensor, exactly as `rounded_on_grid`
writes it: quantization-aware training of the adapter. Gradients pass the rounding as if it were not there, the
straight-through estimator (Bengio et al. 2013, arXiv:1308.3432). docs/measurements.md compares it with other merges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from edgetune_export.adapters.shapes import Floats
from edgetune_export.base_file.grid import Grid
from torch.autograd.function import once_differentiable

from edgetune.bases.weights import GgufWeights
from edgetune.methods.common.peft import tuned_layers


@contextmanager
def rounded_layers(model: Any, base: Path | None) -> Iterator[None]:  # noqa: ANN401 - PEFT carries no types
    """Compute the LoRA layers of PEFT's `model` with merged weights that the base's file could store; None: as usual.

    Needs memory for two float32 copies of their weights while the block runs. Raises IncompatibleError for a tensor
    whose type has no grid.
    """
    if base is None:
        yield
        return
    file, layers = GgufWeights(base), list[Any]()
    try:
        for name, layer in tuned_layers(model):
            weight = f"{name}.weight"
            if (grid := file.grid(weight)) is not None:
                # From the file, since a base in bfloat16 is not exactly on its grid.
                layer.forward = _RoundedLayer(layer, file.values(weight), *grid)
                layers.append(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


class _RoundedLayer:
    """The forward of a LoRA layer whose merged weights are rounded once after each change of its factors."""

    def __init__(self, layer: Any, start: torch.Tensor, grid: Grid, dither: Floats) -> None:  # noqa: ANN401 - as above
        self._layer, self._name = layer, layer.active_adapters[0]
        base = layer.get_base_layer()
        step, offset, inverse = (
            torch.from_numpy(values).to(base.weight.device) for values in (grid.step, grid.offset, grid.inverse)
        )
        self._step, self._offset, self._inverse = step, offset, inverse
        self._range, self._bias = (grid.lowest, grid.highest), base.bias
        # Adding the dither here saves an operation per step: rounding it down is then the same as in `Grid.codes`.
        grouped = start.to(step.device).view(*step.shape[:2], -1)
        self._start = grouped.addcmul_(torch.from_numpy(dither).to(step.device).view_as(grouped), step)
        self._weight = self._start
        self._key: tuple[int, int, torch.dtype] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._layer.lora_A[self._name].weight, self._layer.lora_B[self._name].weight
        device, scale = x.device.type, self._layer.scaling[self._name]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if (key := (a._version, b._version, dtype)) != self._key:
            self._weight, self._key = self._rounded(a.detach(), b.detach(), scale).to(dtype), key
        out: torch.Tensor = _StraightThrough.apply(x, self._weight, a, b, scale)  # type: ignore[no-untyped-call]
        dropout = self._layer.lora_dropout[self._name]
        if self._layer.training and not isinstance(dropout, torch.nn.Identity):
            out = out + (dropout(x) - x) @ a.t() @ b.t() * scale
        return out if self._bias is None else out + self._bias

    def _rounded(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        merged = torch.addmm(self._start.view(len(b), -1), b, a, alpha=scale)
        codes = merged.view_as(self._start).sub_(self._offset).mul_(self._inverse).floor_().clamp_(*self._range)
        return codes.mul_(self._step).add_(self._offset).view_as(merged)


class _StraightThrough(torch.autograd.Function):
    """x·Wᵀ in the dtype of W, with the gradients for A and B as if W were W₀ + scale·B·A."""

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes arguments by position
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows, a, b = x.flatten(0, -2).to(weight.dtype), a.to(weight.dtype), b.to(weight.dtype)
        ctx.save_for_backward(rows, a, b)
        # Not saved: it is there between the passes too, so it is not memory of a pass (`checkpointing.layer_cost`).
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, x.dtype
        return torch.nn.functional.linear(rows, weight).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - as above
        (rows, a, b), weight = ctx.saved_tensors, ctx.weight
        out = grad.flatten(0, -2).to(weight.dtype)
        to_x = (out @ weight).view(*grad.shape[:-1], -1).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_a = (out @ b).mul_(ctx.scale).t() @ rows
        to_b = ((rows @ a.t()).t() @ out).mul_(ctx.scale).t()
        return to_x, None, to_a.float(), to_b.float(), None
