"""The memory that a base needs in llama.cpp, from its header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from edgetune_runtime.bundle import Manifest
from edgetune_runtime.engines import load_needs
from edgetune_runtime.engines.checkpoints import checkpoints_of
from edgetune_runtime.engines.needs import EngineCost, Needs, RecurrentSizes
from edgetune_runtime.formats.gguf_base import read_base
from edgetune_runtime.formats.gguf_file import PER_LAYER_EMBEDDING, GgufHeader
from edgetune_runtime.formats.gguf_sizes import (
    data_start,
    head_lengths,
    kv_values_per_token,
    number,
    recurrent_inputs_per_token,
    recurrent_values,
    vocabulary,
)

from . import KV_TYPES, NAME

BRANCHES = 32
"""Continuations scored in one pass. llama.cpp keeps a row of logits for each: 0.6 MB with a vocabulary of 150,000."""
HYBRID_BRANCHES = 1
"""The same with recurrent layers: each branch needs as many recurrent states as the sequence itself."""
ROLLBACK = 16
"""Tokens that llama.cpp can drop after a step: more than a draft has. It keeps a recurrent state for each."""
ROLLBACK_BYTES = 32_000_000
"""Bytes of the states for dropped tokens."""
_MODULE_BYTES = 5600
"""llama.cpp's graphs have room for the nodes of all adapters that are loaded, whichever are active."""
# Scores are f32, and f16 for the product with the values. Logits are kept in two buffers.
COST = EngineCost(
    kv_types=KV_TYPES,
    runtime_mb=65.0,
    libraries_mb=33.0,
    vocabulary_bytes=350,
    logits_rows=2 * (BRANCHES + 1),
    scores_bytes=4 + 2,
    has_tensor_types=True,
    module_bytes=_MODULE_BYTES,
)


def needs_of_base(path: Path, _manifest: Manifest, context_length: int) -> Needs:
    """See `EngineNeeds`; errors as in `read_base`."""
    header = read_base(path)
    sizes = {name: tensor.nbytes for name, tensor in header.tensors.items()}
    return needs_of_sizes(header, sizes, context_length=context_length)


def recurrent_sizes(header: GgufHeader) -> RecurrentSizes:
    """Those of a base."""
    return RecurrentSizes(recurrent_values(header), recurrent_inputs_per_token(header))


def rollback_of(state_bytes: int) -> int:
    """How many tokens llama.cpp can drop from the end of a step by recurrent states of this size.

    0 if there are none, or if those for it would take too much.
    """
    return ROLLBACK if 0 < (1 + HYBRID_BRANCHES) * (1 + ROLLBACK) * state_bytes <= ROLLBACK_BYTES else 0


def recurrence_of(sizes: RecurrentSizes, context_length: int) -> tuple[int, int | None]:
    """See `EngineNeeds`."""
    size = sizes.state_bytes
    if not size:
        return 0, None
    rollback = rollback_of(size)
    # In llama.cpp, as checkpoints, and one before a step.
    return (1 + HYBRID_BRANCHES) * (1 + rollback) + checkpoints_of(size, context_length) + 1, rollback


def needs_of_sizes(
    header: GgufHeader,
    sizes: Mapping[str, int],
    *,
    context_length: int,
    engine: str = NAME,
) -> Needs:
    """The needs of a base with the shapes and types of `header` whose tensors have these sizes in bytes.

    IncompatibleError if the header lacks a size.
    """
    recurrence = recurrent_sizes(header)
    states, max_rollback = load_needs(engine).recurrence_of(recurrence, context_length)
    counts = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items()}
    head = header.output_tensor
    is_tied = head == "token_embd.weight"
    looked_up = [PER_LAYER_EMBEDDING] if is_tied else [PER_LAYER_EMBEDDING, "token_embd.weight"]
    return Needs(
        base_bytes=data_start(header) + sum(sizes.values()),
        read_bytes=sum(sizes.values()) - sum(sizes.get(name, 0) for name in looked_up),
        read_parameters=sum(counts.values()) - sum(counts.get(name, 0) for name in looked_up),
        head_parameters=counts.get(head, 0),
        layers=number(header, "block_count"),
        heads=number(header, "attention.head_count"),
        embedding_length=number(header, "embedding_length"),
        feed_forward_length=number(header, "feed_forward_length"),
        vocabulary=vocabulary(header),
        kv_values_per_token=kv_values_per_token(header),
        context_length=context_length,
        engine=engine,
        head_bytes=sizes.get(head, 0) if is_tied else 0,
        main_type=header.main_type.name,
        layer_types=header.layer_types,
        head_type=header.tensors[head].type.name if head in header.tensors else "",
        head_lengths=(*head_lengths(header), *head_lengths(header, sliding=True)),
        per_layer_bytes=sizes.get(PER_LAYER_EMBEDDING, 0),
        recurrent_values=recurrence.values,
        recurrent_states=states,
        max_rollback=max_rollback,
    )
