"""The memory that a base needs in onnxruntime, from the sizes of its files and genai_config.json."""

from __future__ import annotations

from pathlib import Path

from edgetune_runtime.bundle import Manifest, bytes_of_model
from edgetune_runtime.engines.checkpoints import checkpoints_of
from edgetune_runtime.engines.needs import EngineCost, Needs, RecurrentSizes
from edgetune_runtime.formats import onnx_recurrence
from edgetune_runtime.formats.onnx_file import OnnxHeader, read_onnx

from . import KV_TYPES, NAME
from .config import CONFIG_NAME, read_config

_PER_LAYER_EMBEDDING = "model.embed_tokens_per_layer."
"""The start of the names of the tensors of the embedding for the inputs of each layer."""
_ANGLES = ("cos_cache", "sin_cache")
_FLOAT, _BLOCK = 1, 32
UNDONE = 32
"""Tokens of a step that can be undone in part; of longer ones, what convolutions read is not kept."""
COST = EngineCost(
    kv_types=KV_TYPES,
    runtime_mb=100.0,
    libraries_mb=67.0,
    vocabulary_bytes=700,
    logits_rows=2,
    scores_bytes=0,
    maps_embedding=True,
    f32_adapters=True,
)


def needs_of_base(path: Path, manifest: Manifest, context_length: int) -> Needs:
    """See `EngineNeeds`; errors as those of `read_config` and `read_onnx`."""
    config, header = read_config(path.with_name(CONFIG_NAME)), read_onnx(path)
    graph = onnx_recurrence.recurrence_of(header)
    states, max_rollback = recurrence_of(RecurrentSizes(graph.values, graph.inputs_per_token), context_length)
    base_bytes = bytes_of_model(manifest.files, manifest.base.files[NAME])
    looked_up_bytes, looked_up_parameters = per_layer_embedding(header)
    return Needs(
        base_bytes=base_bytes,
        read_bytes=base_bytes - looked_up_bytes - angle_bytes(header),
        read_parameters=manifest.base.parameters - looked_up_parameters,
        head_parameters=config.vocabulary * config.width,
        layers=config.layers,
        heads=config.heads,
        embedding_length=config.width,
        # The file does not give it; most models have about three times their width.
        feed_forward_length=3 * config.width,
        vocabulary=config.vocabulary,
        kv_values_per_token=manifest.base.kv_values_per_token,
        context_length=context_length,
        engine=NAME,
        # 8 bits per weight.
        head_bytes=config.vocabulary * config.width,
        per_layer_bytes=looked_up_bytes,
        angle_bytes=angle_bytes(header),
        recurrent_values=graph.values,
        recurrent_states=states,
        max_rollback=max_rollback,
    )


def per_layer_embedding(header: OnnxHeader) -> tuple[int, int]:
    """The bytes and the parameters of the embedding for the inputs of each layer; 0 without one."""
    tensors = [tensor for name, tensor in header.initializers.items() if name.startswith(_PER_LAYER_EMBEDDING)]
    floats = sum(tensor.size for tensor in tensors if tensor.elem_type == _FLOAT)
    # They are all there is, or the scales of blocks.
    return sum(tensor.nbytes for tensor in tensors), floats * (_BLOCK if len(tensors) > 1 else 1)


def angle_bytes(header: OnnxHeader) -> int:
    """The bytes of the tables of angles."""
    return sum(tensor.nbytes for name, tensor in header.initializers.items() if name.startswith(_ANGLES))


def recurrence_of(sizes: RecurrentSizes, context_length: int) -> tuple[int, int | None]:
    """See `EngineNeeds`."""
    if not sizes.values:
        return 0, None
    # Before and after a step, and before branches or a step of several batches; then what convolutions read.
    inputs = -(-UNDONE * sizes.inputs_per_token // sizes.values)
    return 3 + checkpoints_of(sizes.state_bytes, context_length) + inputs, rollback_of(sizes.inputs_per_token)


def rollback_of(inputs_per_token: int) -> int:
    """How many tokens of a step can be dropped, from what convolutions read per token (see `RecurrentSizes`)."""
    return UNDONE - 1 if inputs_per_token else 0
