"""The memory that a base with its adapters needs in each engine, and the bytes that it reads per token.

The constants were measured with both engines on x86-64 Linux; benchmarks/fit.py compares them with measurements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgetune_runtime.bundle import Manifest, read_manifest, resolve
from edgetune_runtime.engines import gguf, onnx
from edgetune_runtime.engines.gguf.engine import BRANCHES
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from edgetune_runtime.states.batches import CHUNK
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN

MB = 10**6
CACHE_BYTES = 128_000_000
"""Memory limit of saved states, the runtime's default."""
SERVER_MB = 12.0
"""Resident memory that `edgetune-run serve` adds: uvicorn, starlette and connections."""
_CONSTRAINT_MB, _CONSTRAINT_BYTES = 5.5, 340
"""What constrained answers add: the library llguidance, and per token of the vocabulary its trie and slices."""
_HOT_LIBRARY_MB = 12.0
"""The part of the libraries that is used all the time: what stayed in memory within a limit that was too small."""


@dataclass(frozen=True)
class EngineCost:
    """What an engine needs in addition to weights, keys and values; `kv_types`: the types of these, the default first.

    `runtime_mb` is the resident memory of Python, the libraries and the runtime, after a few answers; of it,
    `libraries_mb` are mapped files, which the system can drop and read again.
    `vocabulary_bytes` is per token of the vocabulary. `maps_embedding`: the embedding stays mapped beside the weights
    that were rearranged. `scores_bytes` is per head and token of context in a batch, in addition to the mask.
    """

    kv_types: tuple[str, ...]
    runtime_mb: float
    libraries_mb: float
    vocabulary_bytes: int
    logits_rows: int
    scores_bytes: int
    maps_embedding: bool

    @property
    def kv_bytes(self) -> int:
        """Bytes of a number in keys and values of the default type."""
        return int(TENSOR_TYPES[self.kv_types[0]].bytes_per_value)


COSTS: Mapping[str, EngineCost] = {
    # Scores are f32, and f16 for the product with the values. Logits are kept in two buffers.
    gguf.NAME: EngineCost(gguf.KV_TYPES, 65.0, 33.0, 350, 2 * (BRANCHES + 1), 4 + 2, maps_embedding=False),
    onnx.NAME: EngineCost(onnx.KV_TYPES, 100.0, 67.0, 700, 2, 0, maps_embedding=True),
}
"""By engine."""


@dataclass(frozen=True)
class AdapterSize:
    """Bytes of an adapter in memory, the modules that it changes, and whether it `is_mapped` from its file.

    A prefix needs keys and values in the engine's default data type.
    """

    file_bytes: int
    modules: int
    is_mapped: bool = False
    is_prefix: bool = False


@dataclass(frozen=True)
class Needs:
    """Sizes that determine the memory and the speed of a base with its adapters in an engine.

    `read_bytes` and `read_parameters` count the weights read per token: all except an embedding that is not also the
    output head. `kv_values_per_token` are held in the data type `kv`, None for the engine's default. `head_lengths` are
    those of a key and a value of one head, if known. `head_bytes` is the size of an output head that is also the
    embedding, else 0. `main_type` and `head_type` are the tensor types of most weights and of the head; empty if they
    are unknown. `merged` maps each adapter that is a full model to the bytes of its file. `draft_bytes` is the size of
    all draft tables; `constrained`: the answers of an adapter are held to a schema or a grammar.
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
    adapters: Mapping[str, AdapterSize] = field(default_factory=dict)
    merged: Mapping[str, int] = field(default_factory=dict)
    engine: str = gguf.NAME
    head_bytes: int = 0
    main_type: str = ""
    head_type: str = ""
    draft_bytes: int = 0
    constrained: bool = False
    states_limit_bytes: int = CACHE_BYTES
    serves: bool = False
    kv: str | None = None
    head_lengths: tuple[int, ...] = ()

    @property
    def cost(self) -> EngineCost:
        """The constants of the engine."""
        return COSTS[self.engine]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values that one token adds."""
        return int(self.kv_values_per_token * TENSOR_TYPES[self.kv or self.cost.kv_types[0]].bytes_per_value)

    @property
    def weights(self) -> str:
        """What most weights are held in: a tensor type in GGUF, the bits of each in ONNX, scales of blocks apart."""
        if self.engine == gguf.NAME:
            return self.main_type
        bits = 8 * (self.read_bytes - self.head_bytes) / max(self.read_parameters - self.head_parameters, 1)
        return f"{min((4, 8, 16, 32), key=lambda width: abs(width - bits))}-bit"

    @property
    def engine_bytes(self) -> int:
        """Memory of one loaded model in addition to its weights: keys and values, computing, vocabulary."""
        return self.kv_bytes_per_token * self.context_length + self.compute_bytes + self.vocabulary_bytes

    @property
    def compute_bytes(self) -> int:
        """Activations and attention scores of a batch, and logits; the factors of activations were fitted."""
        activations = CHUNK * 4 * (4.4 * self.embedding_length + 3.2 * self.feed_forward_length)
        scores = self.scores_bytes_per_token * self.context_length
        return int(activations) + scores + self.cost.logits_rows * 4 * self.vocabulary

    @property
    def scores_bytes_per_token(self) -> int:
        """Bytes per token of context in a batch: attention scores and a mask."""
        scores = self.heads * self.cost.scores_bytes
        return CHUNK * (scores + 4) if scores else 0

    @property
    def state_bytes(self) -> int:
        """Saved states of the base and each adapter, half a context long, as many as the limit allows."""
        states = len(self.adapters) + 1 if self.adapters else 0
        size = self.kv_bytes_per_token * self.context_length // 2
        return min(states, self.states_limit_bytes // max(size, 1)) * size

    @property
    def vocabulary_bytes(self) -> int:
        """Memory of the tokenizer's tables."""
        return self.vocabulary * self.cost.vocabulary_bytes

    @property
    def constraint_bytes(self) -> int:
        """Memory of the vocabulary that constraints are looked up in, and of their library."""
        return int(_CONSTRAINT_MB * MB) + _CONSTRAINT_BYTES * self.vocabulary if self.constrained else 0


_EMBEDDING = "embedding beside the repacked output head"
_RUNTIME = "runtime (Python and libraries)"


@dataclass(frozen=True)
class Item:
    """One part of the memory needed; of it, `droppable_mb` are mapped files that are rarely read again."""

    name: str
    mb: float
    droppable_mb: float = 0.0


def items_of(needs: Needs, *, repacks: Collection[str]) -> list[Item]:
    """The parts of the memory needed; `repacks` are the processor's `repacked_types`, none if the file is mapped."""
    has_main = needs.main_type in repacks and TENSOR_TYPES[needs.main_type].repacked
    twice = needs.cost.maps_embedding or (has_main and needs.head_type in repacks)
    # One adapter is in use, and each token reads it.
    others = sorted((size.file_bytes, name) for name, size in needs.adapters.items() if size.is_mapped)[:-1]
    droppable_mb = {
        **{f"adapter {name}": size / MB for size, name in others},
        _RUNTIME: needs.cost.libraries_mb - _HOT_LIBRARY_MB,
        _EMBEDDING: needs.head_bytes / MB if needs.cost.maps_embedding else 0.0,
    }
    parts = [
        ("base weights", needs.base_bytes),
        (_EMBEDDING, needs.head_bytes if twice else 0),
        *((f"adapter {name}", size.file_bytes) for name, size in needs.adapters.items()),
        *((f"merged model {name}", size + needs.engine_bytes) for name, size in needs.merged.items()),
        (f"keys and values of {needs.context_length} tokens", needs.kv_bytes_per_token * needs.context_length),
        ("saved states", needs.state_bytes),
        ("draft tables", needs.draft_bytes),
        ("computing", needs.compute_bytes),
        ("vocabulary", needs.vocabulary_bytes),
        ("constraints on answers", needs.constraint_bytes),
        (_RUNTIME, needs.cost.runtime_mb * MB),
        ("server", SERVER_MB * MB if needs.serves else 0),
    ]
    return [Item(name, size / MB, droppable_mb.get(name, 0.0)) for name, size in parts if size]


def needed_mb(needs: Needs, *, repacks: Collection[str]) -> float:
    """The sum of all parts."""
    return sum(item.mb for item in items_of(needs, repacks=repacks))


def kept_mb(needs: Needs, *, repacks: Collection[str]) -> float:
    """The sum of all parts without what the system can drop: with less, the bundle cannot run at full speed."""
    return sum(item.mb - item.droppable_mb for item in items_of(needs, repacks=repacks))


def needs_of_bundle(bundle: Path, *, context_length: int | None = None, engine: str | None = None) -> Needs:
    """The needs of a bundle, from its manifest and the header of its base; weights are not read.

    `engine` defaults to the first one that the bundle has files for. IncompatibleError if it has none for it, and the
    errors of `read_manifest` and of reading the base's header.
    """
    manifest = read_manifest(bundle)
    has = [name for name in manifest.base.files if name in COSTS]
    if not has or (engine is not None and engine not in has):
        wanted = engine or " or ".join(COSTS)
        message = f"bundle {manifest.name!r} has no {wanted} base"
        raise IncompatibleError(
            message, f"use one of: {', '.join(has)}" if has else f"build it with targets: [{wanted}]"
        )
    engine = engine or has[0]
    path = resolve(bundle, manifest.base.files[engine])
    length = context_length or manifest.context_length
    if engine == gguf.NAME:
        needs = needs_of_file(read_header(path), context_length=length)
    else:
        needs = _needs_of_graph(path, manifest, length)
    return replace(needs, **_adapters(manifest, engine))


def needs_of_file(header: GgufHeader, *, context_length: int) -> Needs:
    """The needs of a base as its GGUF file is; IncompatibleError if the header lacks a size."""
    sizes = {name: tensor.nbytes for name, tensor in header.tensors.items()}
    start = min((tensor.offset for tensor in header.tensors.values()), default=0)
    return needs_of_sizes(header, sizes, start=start, context_length=context_length, main_type=header.main_type.name)


def needs_of_sizes(
    header: GgufHeader,
    sizes: Mapping[str, int],
    *,
    start: int,
    context_length: int,
    engine: str = gguf.NAME,
    main_type: str = "",
    head_type: str = "",
) -> Needs:
    """The needs of a base with the shapes of `header` whose tensors have these sizes in bytes, after a `start`.

    `head_type` is by default that in the header.
    """
    counts = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items()}
    tied = "output.weight" not in header.tensors
    looked_up = "" if tied else "token_embd.weight"
    head = "token_embd.weight" if tied else "output.weight"
    return Needs(
        base_bytes=start + sum(sizes.values()),
        read_bytes=sum(sizes.values()) - sizes.get(looked_up, 0),
        read_parameters=sum(counts.values()) - counts.get(looked_up, 0),
        head_parameters=counts.get(head, 0),
        layers=number(header, "block_count"),
        heads=number(header, "attention.head_count"),
        embedding_length=number(header, "embedding_length"),
        feed_forward_length=number(header, "feed_forward_length"),
        vocabulary=_vocabulary(header),
        kv_values_per_token=kv_values_per_token(header),
        context_length=context_length,
        engine=engine,
        head_bytes=sizes.get(head, 0) if tied else 0,
        main_type=main_type,
        head_type=head_type or (header.tensors[head].type.name if head in header.tensors else ""),
        head_lengths=_head_lengths(header),
    )


def kv_values_per_token(header: GgufHeader) -> int:
    """Numbers in the keys and values that one token adds, over all layers.

    Sliding-window layers (Gemma 3) count in full: the engine keeps all positions (`swa_full`), so that it can truncate.
    """
    return number(header, "attention.head_count_kv", total=True) * sum(_head_lengths(header))


def _head_lengths(header: GgufHeader) -> tuple[int, int]:
    """The numbers in a key and in a value of one head."""
    queries = _metadata(header, "attention.head_count")
    queries = max(queries) if isinstance(queries, Sequence) else queries
    default = number(header, "embedding_length") // queries
    key, value = (header.metadata.get(f"{header.architecture}.attention.{n}_length", default) for n in ("key", "value"))
    return int(key), int(value)


def number(header: GgufHeader, key: str, *, total: bool = False) -> int:
    """An integer of the architecture; of a number per layer, the largest, or with `total` the sum over all layers."""
    value = _metadata(header, key)
    if isinstance(value, Sequence):
        return sum(map(int, value)) if total else max(map(int, value))
    return int(value) * (number(header, "block_count") if total else 1)


def _adapters(manifest: Manifest, engine: str) -> dict[str, Any]:
    adapters: dict[str, AdapterSize] = {}
    merged: dict[str, int] = {}
    drafts = 0
    for name, entry in manifest.adapters.items():
        file_bytes = manifest.files[entry.files[engine]].bytes if engine in entry.files else 0
        if entry.shapes.get(engine) == "merged":
            merged[name] = file_bytes + _beside(manifest, entry.files[engine])
        else:
            types = entry.values_by_type.get(engine, {})
            in_memory = 4 * sum(types.values()) if engine == onnx.NAME and types else file_bytes
            # Values in float16 are copied.
            is_mapped = engine == onnx.NAME and [*types] == ["f32"]
            is_prefix = entry.shapes.get(engine) == "prefix"
            adapters[name] = AdapterSize(in_memory, len(entry.ranks), is_mapped, is_prefix)
        drafts += manifest.files[entry.draft].bytes if entry.draft else 0
    constrained = any(entry.output for entry in manifest.adapters.values())
    return {"adapters": adapters, "merged": merged, "draft_bytes": drafts, "constrained": constrained}


def _beside(manifest: Manifest, file: str) -> int:
    """Bytes of the weights in a graph's folder, which are files of their own."""
    graph = PurePosixPath(file)
    if graph.suffix != ".onnx":
        return 0
    named = (PurePosixPath(name) for name in manifest.files)
    return sum(manifest.files[str(n)].bytes for n in named if n.parent == graph.parent and n.suffix == ".data")


def _needs_of_graph(path: Path, manifest: Manifest, context_length: int) -> Needs:
    """The needs of an ONNX base, from the sizes of its files and genai_config.json."""
    try:
        model = json.loads(path.with_name("genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        sizes = {key: int(decoder[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
        vocabulary = int(model["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        message = f"{path.with_name('genai_config.json')} does not give the model's sizes: {error}"
        raise VerificationError(message, COPY_BUNDLE_AGAIN) from error
    file = manifest.base.files[onnx.NAME]
    base_bytes = manifest.files[file].bytes + _beside(manifest, file)
    width, parameters = sizes["hidden_size"], manifest.base.parameters
    return Needs(
        base_bytes=base_bytes,
        read_bytes=base_bytes,
        read_parameters=parameters,
        head_parameters=vocabulary * width,
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        embedding_length=width,
        # The file does not give it; most models have about three times their width.
        feed_forward_length=3 * width,
        vocabulary=vocabulary,
        kv_values_per_token=manifest.base.kv_values_per_token,
        context_length=context_length,
        engine=onnx.NAME,
        # 8 bits per weight.
        head_bytes=vocabulary * width,
    )


def _vocabulary(header: GgufHeader) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    embedding = header.tensors.get("token_embd.weight")
    return embedding.shape[1] if embedding is not None else 0


def _metadata(header: GgufHeader, key: str) -> Any:  # noqa: ANN401 - a number, or one per layer
    full = f"{header.architecture}.{key}"
    if full not in header.metadata:
        raise IncompatibleError(f"the base's header has no {full}", "give a GGUF file of a language model")
    return header.metadata[full]
