"""The number of recurrent states of a sequence, and of tokens of a step that can be undone. Needs no library."""

from __future__ import annotations

from edgetune_runtime.engines.checkpoints import checkpoints_of
from edgetune_runtime.engines.needs import RecurrentSizes

UNDONE = 32
"""Tokens of a step that can be undone in part; of longer ones, what convolutions read is not kept."""


def rollback_of(sizes: RecurrentSizes) -> int:
    """How many tokens of a step can be dropped."""
    return UNDONE - 1 if sizes.inputs_per_token else 0


def states_of(sizes: RecurrentSizes, context_length: int) -> int:
    """The recurrent states that a sequence holds: before and after a step, before branches or a step of several
    batches, as checkpoints, and with as many values as what convolutions read; 0 without any."""
    if not sizes.values:
        return 0
    inputs = -(-UNDONE * sizes.inputs_per_token // sizes.values)
    return 3 + checkpoints_of(sizes.state_bytes, context_length) + inputs
