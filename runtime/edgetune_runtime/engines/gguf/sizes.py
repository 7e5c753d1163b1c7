"""The number of branches of a context, and of tokens that it can drop after a step. Needs no library."""

from __future__ import annotations

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
    """How many tokens llama.cpp can drop from the end of a step by recurrent states of this size.

    0 if there are none, or if those for it would take too much.
    """
    return ROLLBACK if 0 < (1 + HYBRID_BRANCHES) * (1 + ROLLBACK) * state_bytes <= ROLLBACK_BYTES else 0
