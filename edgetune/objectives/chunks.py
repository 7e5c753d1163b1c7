"""Computes the loss on chunks of logits, so that the logits of all predictions are never in memory at once.

Logits are as wide as the vocabulary. The loss and gradients of a chunk are computed and its logits freed before the
next chunk, as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from edgetune_export import architectures
from transformers import PreTrainedConfig, PreTrainedModel

from edgetune.objectives.base import LOGITS_PER_CHUNK

LossOf = Callable[[torch.Tensor, slice], torch.Tensor]
"""Maps float32 logits [rows, vocabulary] and the slice of predictions that they belong to, to their summed loss."""


def summed_loss(run: Callable[[], torch.Tensor], model: torch.nn.Module, loss_of: LossOf) -> torch.Tensor:
    """Summed loss of all predictions of `run`, which calls `model` and returns its logits [predictions, vocabulary]."""
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    architecture, config = architectures.of_model_type(base.config.model_type), copy(base.config)

    def loss_of_output(output: torch.Tensor, rows: slice) -> torch.Tensor:
        return loss_of(architecture.logits_of(output, config), rows)

    with (
        _changed(base.config, architecture.unchanged_logits),
        _loss_as_logits(base.get_output_embeddings(), config.vocab_size, loss_of_output),
    ):
        return run().sum()


@contextmanager
def _changed(config: PreTrainedConfig, entries: Mapping[str, Any]) -> Iterator[None]:
    """Change entries of a base's config, so that it returns what its head returns: here the loss."""
    before = {name: getattr(config, name) for name in entries}
    try:
        for name, value in entries.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _loss_as_logits(head: Any, vocabulary: int, loss_of: LossOf) -> Iterator[None]:  # noqa: ANN401 - a linear layer
    """Make the head of a base return the summed loss [1, 1, 1] of its inputs [1, predictions, width]."""
    logits_of = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        with_gradients = torch.is_grad_enabled()
        arguments = (hidden[0], logits_of, loss_of, vocabulary, with_gradients, *trained)
        loss: torch.Tensor = _ChunkedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss.view(1, 1, 1)

    head.forward = forward
    try:
        yield
    finally:
        head.forward = logits_of


class _ChunkedLoss(torch.autograd.Function):
    """The loss of inputs [predictions, width]; the forward pass computes the gradients too."""

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes arguments by position
        ctx: Any,  # noqa: ANN401 - torch's
        hidden: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        loss_of: LossOf,
        vocabulary: int,
        with_gradients: bool,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = torch.zeros_like(hidden)
        of_trained = [torch.zeros_like(parameter) for parameter in trained] if with_gradients else []
        for rows in _chunks(len(hidden), vocabulary):
            with torch.set_grad_enabled(with_gradients):
                chunk = hidden[rows].detach().requires_grad_(with_gradients)
                loss = loss_of(logits_of(chunk).float(), rows)
            total += loss.detach()
            if with_gradients:
                gradients[rows], *more = torch.autograd.grad(loss, [chunk, *trained])
                for whole, gradient in zip(of_trained, more, strict=True):
                    whole.add_(gradient)
        ctx.save_for_backward(gradients, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401 - torch's
        hidden, *trained = (saved * gradient for saved in ctx.saved_tensors)
        return hidden, None, None, None, None, *trained


def _chunks(predictions: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    for start in range(0, predictions, size):
        yield slice(start, start + size)
