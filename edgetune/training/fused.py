"""Fused LoRA layers and RMSNorms that need fewer passes over memory, for training on the CPU.

The matrix products with the frozen weights already run close to the processor's peak. The time to save is between them:
autograd writes a tensor for each scaling, addition and cast in a PEFT layer and in a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from edgetune_export import architectures
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable

from .int8 import PackedLayers, PackedLinear, in_int8

Forward = Callable[..., torch.Tensor]

_TYPES = frozenset({torch.float32, torch.bfloat16})


@contextmanager
def fused(model: torch.nn.Module, *, int8: bool = False) -> Iterator[None]:
    """Fuse the plain LoRA layers and frozen RMSNorms of `model` while the block runs.

    Losses and gradients are the same within the rounding of the base's type. Layers of other kinds, and layers that are
    neither in float32 nor in bfloat16 on the CPU, are unchanged. With `int8`, frozen linear layers are computed as in
    `in_int8`.
    """
    packing: AbstractContextManager[PackedLayers] = in_int8(model) if int8 else nullcontext({})
    with packing as packed:
        forwards = {module: forward for module in model.modules() if (forward := _fused_forward(module, packed))}
        for module, forward in forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in forwards:
                del module.forward


def _fused_forward(module: Any, packed: PackedLayers) -> Forward | None:  # noqa: ANN401 - PEFT and transformers carry no types
    """The fused forward of a module, or None if there is none for it."""
    # An instance attribute `forward` was set by other code, such as a hook of accelerate.
    if "forward" in vars(module) or not all(p.dtype in _TYPES and p.device.type == "cpu" for p in module.parameters()):
        return None
    if _is_plain_lora(module):
        return partial(_lora_forward, module, packed.get(module.base_layer))
    addend = _norms().get(type(module).__name__)
    # Gemma 4's norms of values have no weights.
    if addend is None or not [*module.parameters()] or any(p.requires_grad for p in module.parameters()):
        return None
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return partial(_norm_forward, module, addend, epsilon)


@cache
def _norms() -> dict[str, float]:
    """What each known RMSNorm class adds to its weights. Other classes are not fused."""
    return {architecture.rms_norm: architecture.norm_offset for architecture in architectures.known().values()}


def _is_plain_lora(module: Any) -> bool:  # noqa: ANN401 - PEFT carries no types
    """Whether a module is a single LoRA on a frozen linear layer, without dropout and not a LoRA variant."""
    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear or len(module.lora_A) != 1:
        return False
    name = next(iter(module.lora_A))
    return (
        list(module.active_adapters) == [name]
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_B[name].bias is None
        and not any(p.requires_grad for p in module.base_layer.parameters())
    )


def _lora_forward(module: Any, packed: PackedLinear | None, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - as above
    if module.disable_adapters or module.merged or _is_cast(x, module.base_layer.weight):
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    name, base = module.active_adapters[0], module.base_layer
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    out: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, a, b, module.scaling[name], packed if module.training else None
    )
    return out


def _is_cast(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of both has another type than one of them."""
    return x.dtype != weight.dtype or (x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))


def _norm_forward(module: Any, addend: float, epsilon: float, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - as above
    weight = module.weight.float()
    if addend:
        weight = weight + addend
    out: torch.Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


class _LoraLinear(torch.autograd.Function):
    """x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ, with gradients for x, A and B; products with W in int8 if `packed` is given."""

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes arguments by position
        ctx: Any,  # noqa: ANN401 - torch gives it no public type
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        packed: PackedLinear | None,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        # The weights of the adapter are in float32, also where the base's are not.
        ctx.type, a, b = a.dtype, a.to(x.dtype), b.to(x.dtype)
        low = rows @ a.t()
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scale, ctx.packed = scale, packed
        out = torch.nn.functional.linear(rows, weight, bias) if packed is None else packed.outputs(rows)
        return out.addmm_(low, b.t(), alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - as above
        rows, low, weight, a, b = ctx.saved_tensors
        out = grad.flatten(0, -2)
        to_low = (out @ b).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = out @ weight if ctx.packed is None else ctx.packed.inputs(out)
            to_x = to_x.addmm_(to_low, a).view(*grad.shape[:-1], -1)
        to_b = (low.t() @ out).to(ctx.type).mul_(ctx.scale).t()
        return to_x, None, None, (to_low.t() @ rows).to(ctx.type), to_b, None, None


class _RMSNorm(torch.autograd.Function):
    """weight·x / sqrt(mean(x²) + epsilon) over the last dimension, with the gradient for x (arXiv:1910.07467).

    Computed in float32, the type of `weight`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:  # noqa: ANN401 - as above
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: torch.Tensor = (x * inverse).mul_(weight).to(x.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - as above
        x, weight, inverse = ctx.saved_tensors
        weighted = grad * weight
        exact = x.to(weight.dtype)
        along = torch.linalg.vecdot(weighted, exact).unsqueeze(-1)
        to_x = weighted.mul_(inverse).addcmul_(exact, along * inverse.pow(3) / -x.shape[-1])
        return to_x.to(x.dtype), None, None
