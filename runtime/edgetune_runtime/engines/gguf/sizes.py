"""The number of branches and of recurrent states of a context. Needs no library."""

from __future__ import annotations

from edgetune_runtime.engines.checkpoints import checkpoints_of
from edgetune_runtime.engines.needs import RecurrentSizes
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import recurrent_inputs_per_token, recurrent_values

BRANCHES = 32
"""Continuations scored in one pass. llama.cpp keeps a row of logits for each: 0.6 MB with a vocabulary of 150,000."""
HYBRID_BRANCHES = 1
"""The same with recurrent layers: each branch needs as many recurrent states as the sequence itself."""
ROLLBACK = 16
"""Tokens that llama.cpp can drop after a step: more than a draft has. It keeps a recurrent state for each."""
ROLLBACK_BYTES = 32_000_000
"""Bytes of the states for dropped tokens."""


def recurrent_sizes(header: GgufHeader) -> RecurrentSizes:
    """Those of a base."""
    return RecurrentSizes(recurrent_values(header), recurrent_inputs_per_token(header))


def rollback_of(state_bytes: int) -> int:
    """How many tokens llama.cpp can drop from the end of a step; none if the states for it would take too much."""
    return ROLLBACK if (1 + HYBRID_BRANCHES) * (1 + ROLLBACK) * state_bytes <= ROLLBACK_BYTES else 0


def states_of(state_bytes: int, context_length: int) -> int:
    """The recurrent states of this size that a context holds, in llama.cpp and as checkpoints; 0 without any."""
    if not state_bytes:
        return 0
    in_llama_cpp = (1 + HYBRID_BRANCHES) * (1 + rollback_of(state_bytes))
    return in_llama_cpp + checkpoints_of(state_bytes, context_length) + 1
