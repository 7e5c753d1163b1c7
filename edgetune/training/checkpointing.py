"""Activation checkpointing of a base's first layers, by transformers, and what a pass keeps without it, measured."""

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
    """The layers of the base in `model` that can be checkpointed, in order; none where transformers does not say."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """Keep the layers' inputs alone in forward passes, and compute the layers again in backward passes.

    Both belong into the block.
    """
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        # transformers would drop the cache, which holds a trained prefix here and is only read.
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer._can_checkpoint_with_cache


@dataclass(frozen=True)
class LayerCost:
    """Bytes that a layer keeps for the backward pass, those of its input among them."""

    kept: int
    input: int


def layer_cost(run: Callable[[], object], layers: Sequence[torch.nn.Module]) -> LayerCost:
    """What the last of `layers` keeps in the forward pass `run` beyond what others of them keep too, such as masks. No
    layer besides them keeps anything."""
    counted = {p.untyped_storage().data_ptr(): _ref(p) for layer in layers for p in layer.parameters()}
    sizes = [0, 0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        # A place whose tensor was freed may hold another one now.
        if place not in counted or counted[place].expired():  # type: ignore[no-untyped-call]
            counted[place] = _ref(tensor)
            sizes[0] += tensor.untyped_storage().nbytes()
        return tensor

    def before(_layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        sizes[:] = 0, inputs[0].nbytes
        watch.enter_context(torch.enable_grad())
        watch.enter_context(torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor))
        return (inputs[0].requires_grad_(), *inputs[1:])

    # An error may leave a layer half-way, with gradients on.
    with torch.no_grad(), ExitStack() as hooks, ExitStack() as watch:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before).remove)
            hooks.callback(layer.register_forward_hook(lambda *_: watch.close()).remove)
        run()
    return LayerCost(*sizes)


def trained_layers(layers: Sequence[torch.nn.Module]) -> int:
    """How many of the base's layers gradients reach: those from the first one with trained parameters on, and all
    where none has any, as what is trained stands before or beside them."""
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return len(layers) - trained.index(True) if True in trained else len(layers)


def _ref(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
