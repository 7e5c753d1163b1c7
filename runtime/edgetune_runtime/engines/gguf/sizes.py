"""How many branches, recurrent states and checkpoints of these a context has. Needs no library."""

from __future__ import annotations

from edgetune_runtime.states.batches import CHUNK

BRANCHES = 32
"""Continuations scored in one pass. llama.cpp keeps a row of logits for each: 0.6 MB with a vocabulary of 150,000."""
HYBRID_BRANCHES = 1
"""The same with recurrent layers: each branch needs as many recurrent states as the sequence itself."""
ROLLBACK = 16
"""Tokens that llama.cpp can drop after a step: more than a draft has. It keeps a recurrent state for each."""
CHECKPOINTS_BYTES = 32_000_000
"""Bytes of checkpoints of one sequence, of which at least two are kept, and of the states for dropped tokens."""


def rollback_of(state_bytes: int) -> int:
    """How many tokens llama.cpp can drop from the end of a step; none if the states for it would take too much."""
    return ROLLBACK if (1 + HYBRID_BRANCHES) * (1 + ROLLBACK) * state_bytes <= CHECKPOINTS_BYTES else 0


def most_checkpoints(state_bytes: int) -> int:
    """Checkpoints that are kept of a sequence whose recurrent state has this size."""
    return max(2, CHECKPOINTS_BYTES // state_bytes)


def states_of(state_bytes: int, context_length: int) -> int:
    """The recurrent states of this size that a context holds, in llama.cpp and as checkpoints; 0 without any."""
    if not state_bytes:
        return 0
    parts = context_length // CHUNK + 2
    in_llama_cpp = (1 + HYBRID_BRANCHES) * (1 + rollback_of(state_bytes))
    return in_llama_cpp + min(parts, most_checkpoints(state_bytes)) + 1
