"""Computes layers with a recurrent state on packed rows: each row from the state after the shared prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

if TYPE_CHECKING:
    from .packing import PackedRows


def keep_rows_apart(block: type[torch.nn.Module], reach: Callable[[Any], int]) -> None:
    """Let the forward of a class of transformers take `packed`, as attention does; without it nothing changes.

    `reach(block)` is how many tokens before a token its output depends on.
    """
    forward: Callable[..., torch.Tensor] = block.forward

    @wraps(forward)
    def packed_forward(
        self: torch.nn.Module, hidden_states: torch.Tensor, *, packed: PackedRows | None = None, **options: object
    ) -> torch.Tensor:
        if packed is None:
            return forward(self, hidden_states, **options)
        outputs = []
        for group in packed.groups:
            rows, width = group.queries.shape
            read = group.keys[:, -(width + reach(self)) :]
            states = hidden_states[0].index_select(0, read.flatten()).view(rows, read.shape[1], -1)
            outputs.append(forward(self, states, **options)[:, -width:].flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed.place)[None]

    block.forward = packed_forward  # type: ignore[assignment]


keep_rows_apart(Lfm2ShortConv, lambda block: block.conv_kernel_size - 1)
