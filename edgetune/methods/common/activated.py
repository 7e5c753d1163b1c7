"""Training of an activated LoRA on packed rows: its objective, and the gate that selects the tokens it acts on.

PEFT's own gate assumes that each row of a batch is one text. This one selects tokens in a packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from edgetune_runtime.states.activation import start_of
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from edgetune.objectives.example import Example
from edgetune.objectives.next_token import NextToken
from edgetune.objectives.packing import PackedRows, pack


@dataclass(frozen=True)
class Activated(PackedRows):
    """Packed rows; `active` [1, n] is True for the tokens on which the adapter acts."""

    active: torch.Tensor


class ActivatedNextToken(NextToken):
    """Next-token prediction for the tokens on which the adapter acts."""

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = tuple(invocation)

    def learned(self, row: Example) -> int:
        """Number of learned tokens that are predicted from a token on which the adapter acts."""
        return sum(self._after_invocation(row).learned)

    def shared(self, rows: Sequence[Example]) -> int:
        """The length of their common prefix, without tokens on which the adapter acts in any of them."""
        return min([super().shared(rows), *(start_of(row.tokens, self.invocation) for row in rows)])

    def batch(self, rows: Sequence[Example]) -> Activated:
        """The rows packed one after another, after what they share."""
        starts = [start_of(row.tokens, self.invocation) for row in rows]
        shared = self.shared(rows)
        packed = pack([self._after_invocation(row) for row in rows], shared)
        active = [False] * shared
        for row, start in zip(rows, starts, strict=True):
            active += [position >= start for position in range(shared, len(row.tokens))]
        return Activated(**{f.name: getattr(packed, f.name) for f in fields(packed)}, active=torch.tensor([active]))

    def loss(self, forward: Callable[..., Any], model: PeftModel, batch: PackedRows) -> torch.Tensor:
        """Cross entropy; logits are computed only where there is loss."""
        assert isinstance(batch, Activated)
        model.packed_gate.active = batch.active
        return super().loss(forward, model, batch)

    def _after_invocation(self, row: Example) -> Example:
        """The row without the loss before the invocation, which training the adapter cannot change."""
        start = start_of(row.tokens, self.invocation)
        return replace(row, learned=tuple(on and i > start for i, on in enumerate(row.learned)))


class PackedGate:
    """Replaces PEFT's aLoRA variant of a layer in training; `active` [1, n] is True for the tokens to act on.

    PEFT passes these to its layers during the forward pass only, but activation checkpointing runs layers again later.
    """

    active: torch.Tensor

    def forward(
        self,
        module: Any,  # noqa: ANN401 - PEFT carries no types
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **_kwargs: object,
    ) -> torch.Tensor:
        """The base's `result` [1, n, rows] with the update added to the active tokens."""
        inputs = module.lora_dropout[active_adapter](x[self.active])
        added = module.lora_B[active_adapter](module.lora_A[active_adapter](inputs)) * module.scaling[active_adapter]
        return result.index_put((self.active,), added.to(result.dtype), accumulate=True)


def gate(model: PeftModel) -> None:
    """Make the layers of `model` use the active tokens of its `packed_gate`."""
    model.packed_gate = PackedGate()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant.update(dict.fromkeys(module.lora_variant, model.packed_gate))
