"""The number of tokens of a step that can be undone. Needs no library."""

from __future__ import annotations

UNDONE = 32
"""Tokens of a step that can be undone in part; of longer ones, what convolutions read is not kept."""


def rollback_of(inputs_per_token: int) -> int:
    """How many tokens of a step can be dropped, from what convolutions read per token (see `RecurrentSizes`)."""
    return UNDONE - 1 if inputs_per_token else 0
