"""What determines the memory and the speed of a base with its adapters: its sizes, and the constants of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edgetune_runtime.bundle import AdapterEntry, Manifest
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.states.batches import CHUNK
from edgetune_runtime.states.cache import CACHE_MB

from . import load_needs

MB = 10**6
_FLOAT_BYTES = 4
ADAPTERS_MB = 256
"""Memory limit of loaded adapters by default, in MB."""
_CONSTRAINT_MB, _CONSTRAINT_BYTES = 5.5, 340
"""What constrained answers add: the library llguidance, and per token of the vocabulary its trie and slices."""


@dataclass(frozen=True)
class EngineCost:
    """What an engine needs in addition to weights, keys and values; `kv_types`: the types of these, the default first.

    `runtime_mb` is the resident memory of Python, the libraries and the runtime, after a few answers; of it,
    `libraries_mb` are mapped files, which the system can drop and read again.
    `vocabulary_bytes` is per token of the vocabulary. `maps_embedding`: the embedding stays mapped beside the weights
    that were rearranged. `scores_bytes` is per head and token of context in a batch, in addition to the mask.
    `has_tensor_types`: weights have GGUF's tensor types. `f32_adapters`: adapters are f32 in memory, mapped from files
    that have only f32; without it, they are as in their files. `module_bytes` is per context and module that a loaded
    adapter changes, beside the adapter itself.
    """

    kv_types: tuple[str, ...]
    runtime_mb: float
    libraries_mb: float
    vocabulary_bytes: int
    logits_rows: int
    scores_bytes: int
    maps_embedding: bool = False
    has_tensor_types: bool = False
    f32_adapters: bool = False
    module_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of a number in keys and values of the default type."""
        return int(TENSOR_TYPES[self.kv_types[0]].bytes_per_value)


@dataclass(frozen=True)
class AdapterSize:
    """Bytes of an adapter in memory, the modules that it changes, and whether it `is_mapped` from its file.

    A prefix needs keys and values in the engine's default data type.
    """

    file_bytes: int
    modules: int
    is_mapped: bool = False
    is_prefix: bool = False


def adapter_size(manifest: Manifest, entry: AdapterEntry, engine: str) -> AdapterSize:
    """The size of an adapter that is not merged in an engine with needs; 0 bytes without a file for it."""
    file_bytes = manifest.files[entry.files[engine]].bytes if engine in entry.files else 0
    types = entry.values_by_type.get(engine, {}) if load_needs(engine).COST.f32_adapters else {}
    # Values in float16 are copied.
    in_memory = _FLOAT_BYTES * sum(types.values()) if types else file_bytes
    is_prefix = entry.shapes.get(engine) == "prefix"
    return AdapterSize(in_memory, entry.module_count, is_mapped=[*types] == ["f32"], is_prefix=is_prefix)


@dataclass(frozen=True)
class RecurrentSizes:
    """Numbers in the recurrent state of a sequence, 0 if all layers attend, and those that convolutions read per token,
    0 unless earlier states can be computed from them alone."""

    values: int
    inputs_per_token: int

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, in float32."""
        return _FLOAT_BYTES * self.values


@dataclass(frozen=True)
class Needs:
    """Sizes that determine the memory and the speed of a base with its adapters in an engine.

    `read_bytes` and `read_parameters` count the weights read per token: all except embeddings that are not also the
    output head. `per_layer_bytes` is the size of the embedding for the inputs of each layer, of which only the rows of
    tokens that occur are read, and `angle_bytes` that of tables of angles, with a row for each position.
    `kv_values_per_token` are held in the data type `kv`, None for the engine's default. `head_lengths` are those of a
    key and a value of one head, if known. `head_bytes` is the size of an output head that is also the embedding, else
    0. `main_type` and `head_type` are the tensor types of most weights and of the head, `layer_types` all those
    of the layers' matrices; empty if they are unknown.
    `merged` maps each adapter that is a full model to the bytes of its file.
    `draft_bytes` is the size of all draft tables; `recurrent_values` are the numbers in the recurrent state of a
    sequence, and `recurrent_states` how many of them a loaded model holds; for `max_rollback` see `Engine`.
    `constrained`: the answers of an adapter are held to a schema or a grammar. Saved states have up to `cache_mb`,
    adapters in memory up to `adapters_mb`.
    """

    base_bytes: int
    read_bytes: int
    read_parameters: int
    head_parameters: int
    layers: int
    heads: int
    embedding_length: int
    feed_forward_length: int
    vocabulary: int
    kv_values_per_token: int
    context_length: int
    engine: str
    adapters: Mapping[str, AdapterSize] = field(default_factory=dict)
    merged: Mapping[str, int] = field(default_factory=dict)
    head_bytes: int = 0
    per_layer_bytes: int = 0
    angle_bytes: int = 0
    main_type: str = ""
    head_type: str = ""
    layer_types: tuple[str, ...] = ()
    draft_bytes: int = 0
    constrained: bool = False
    cache_mb: float = CACHE_MB
    adapters_mb: float = ADAPTERS_MB
    serves: bool = False
    kv: str | None = None
    head_lengths: tuple[int, ...] = ()
    recurrent_values: int = 0
    recurrent_states: int = 0
    max_rollback: int | None = None

    @property
    def cost(self) -> EngineCost:
        """The constants of the engine."""
        return load_needs(self.engine).COST

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values that one token adds."""
        return int(self.kv_values_per_token * TENSOR_TYPES[self.kv or self.cost.kv_types[0]].bytes_per_value)

    @property
    def weights(self) -> str:
        """The tensor type of most weights; where weights have none, their bits without the scales of blocks."""
        if self.cost.has_tensor_types:
            return self.main_type
        bits = 8 * (self.read_bytes - self.head_bytes) / max(self.read_parameters - self.head_parameters, 1)
        return f"{min((4, 8, 16, 32), key=lambda width: abs(width - bits))}-bit"

    @property
    def engine_bytes(self) -> int:
        """Memory of one loaded model in addition to its weights: keys and values, computing, vocabulary."""
        cached = self.kv_bytes_per_token * self.context_length + self.recurrent_bytes
        return cached + self.compute_bytes + self.vocabulary_bytes

    @property
    def recurrent_bytes(self) -> int:
        """Memory of the recurrent states of one loaded model."""
        return _FLOAT_BYTES * self.recurrent_values * self.recurrent_states

    @property
    def compute_bytes(self) -> int:
        """Activations and attention scores of a batch, and logits; the factors of activations were fitted."""
        activations = CHUNK * _FLOAT_BYTES * (4.4 * self.embedding_length + 3.2 * self.feed_forward_length)
        scores = self.scores_bytes_per_token * self.context_length
        return int(activations) + scores + self.cost.logits_rows * _FLOAT_BYTES * self.vocabulary

    @property
    def scores_bytes_per_token(self) -> int:
        """Bytes per token of context in a batch: attention scores and a mask."""
        scores = self.heads * self.cost.scores_bytes
        return CHUNK * (scores + _FLOAT_BYTES) if scores else 0

    @property
    def state_bytes(self) -> int:
        """Saved states of the base and each adapter, half a context long, or the limit if they are larger.

        An upper bound: whole states rarely use all of the limit. It does not shrink as the context grows.
        """
        states = len(self.adapters) + 1 if self.adapters else 0
        size = self.kv_bytes_per_token * self.context_length // 2 + _FLOAT_BYTES * self.recurrent_values
        return min(states * size, int(self.cache_mb * MB))

    @property
    def vocabulary_bytes(self) -> int:
        """Memory of the tokenizer's tables."""
        return self.vocabulary * self.cost.vocabulary_bytes

    @property
    def constraint_bytes(self) -> int:
        """Memory of the vocabulary that constraints are looked up in, and of their library."""
        return int(_CONSTRAINT_MB * MB) + _CONSTRAINT_BYTES * self.vocabulary if self.constrained else 0


class EngineNeeds(Protocol):
    """The module `needs` of an engine's folder. An engine without one runs, but its memory is not predicted.

    The constants were measured on x86-64 Linux; benchmarks/fit.py compares predictions with measurements.
    """

    COST: EngineCost

    def needs_of_base(self, path: Path, manifest: Manifest, context_length: int) -> Needs:
        """The needs of the base at `path`, from its header or the files beside it; weights are not read."""

    def recurrence_of(self, sizes: RecurrentSizes, context_length: int) -> tuple[int, int | None]:
        """How many recurrent states of these sizes a sequence holds, and the engine's `max_rollback` with them."""
