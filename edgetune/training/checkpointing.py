"""Activation checkpointing of a base's layers through transformers, and measuring what a layer keeps without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of the base in `model` that can be checkpointed, in order; empty if transformers marks none."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """Keep only the layers' inputs in forward passes, and recompute the layers in backward passes.

    Run both passes inside the block.
    """
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        # transformers would drop the cache, but here it contains a trained prefix and is only read.
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer._can_checkpoint_with_cache


@dataclass(frozen=True)
class LayerCost:
    """Bytes that a layer keeps for the backward pass; `kept` includes its `input`."""

    kept: int
    input: int


def layer_cost(run: Callable[[], object], layers: Sequence[torch.nn.Module]) -> LayerCost:
    """What the last of `layers` keeps in the forward pass `run`, without what the others also keep, such as masks.

    Only these layers run with gradients.
    """
    # A weak reference keeps the storage's identity, so that no other tensor takes it when the storage is freed.
    counted = {_ref(p) for layer in layers for p in layer.parameters()}
    sizes = [0, 0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if (reference := _ref(tensor)) not in counted:
            counted.add(reference)
            sizes[0] += tensor.untyped_storage().nbytes()
        return tensor

    def before(_layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        sizes[:] = 0, inputs[0].nbytes
        watch.enter_context(torch.enable_grad())
        watch.enter_context(torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor))
        return (inputs[0].requires_grad_(), *inputs[1:])

    # `watch` also ends when an error leaves a layer early with gradients enabled.
    with torch.no_grad(), ExitStack() as hooks, ExitStack() as watch:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before).remove)
            hooks.callback(layer.register_forward_hook(lambda *_: watch.close()).remove)
        run()
    return LayerCost(*sizes)


def trained_layers(layers: Sequence[torch.nn.Module]) -> int:
    """Number of the base's layers that gradients reach: from the first layer with trained parameters to the last.

    All of them if no layer has trained parameters: what is trained then comes before or beside the layers.
    """
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return len(layers) - trained.index(True) if True in trained else len(layers)


def _ref(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
