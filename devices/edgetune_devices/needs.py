"""Estimates the memory of a base with its adapters, and the bytes read per token, from a bundle, a header or sizes.

The constants were measured with the runtime's GGUF engine: one copy of the weights, mapped or repacked, f16 keys and
values, batches of `CHUNK` tokens, no flash attention. docs/boards.md compares predictions with measurements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune_runtime.bundle import read_manifest, resolve
from edgetune_runtime.engines import gguf
from edgetune_runtime.engines.gguf.engine import BRANCHES
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from edgetune_runtime.formats.quantization import TENSOR_TYPES, Quantization, quantization_named, quantization_of_merged
from edgetune_runtime.states.batches import CHUNK

CACHE_BYTES = 128_000_000
"""Memory limit of saved states, the runtime's default."""
VOCABULARY_BYTES_PER_TOKEN = 350
"""llama.cpp's tables of a vocabulary: 17 MB for the 49,152 tokens and 48,900 merges of SmolLM2."""

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class AdapterSize:
    """Bytes of an adapter's file, and the modules that it changes."""

    file_bytes: int
    modules: int


@dataclass(frozen=True)
class Needs:
    """Sizes that determine the memory and the speed of a base with its adapters.

    `read_bytes` and `read_parameters` count the weights read per token: all except an embedding that is not also the
    output head. `merged` maps each adapter that is a full model to the bytes of its file.
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
    kv_bytes_per_token: int
    context_length: int
    adapters: Mapping[str, AdapterSize] = field(default_factory=dict)
    merged: Mapping[str, int] = field(default_factory=dict)

    @property
    def engine_bytes(self) -> int:
        """Memory of one loaded model in addition to its weights: keys and values, computing, vocabulary."""
        return self.kv_bytes_per_token * self.context_length + self.compute_bytes + self.vocabulary_bytes

    @property
    def compute_bytes(self) -> int:
        """Activations and attention scores of a batch, and logits of all branches; activation factors were fitted."""
        activations = CHUNK * 4 * (4.4 * self.embedding_length + 3.2 * self.feed_forward_length)
        scores = self.scores_bytes_per_token * self.context_length
        return int(activations) + scores + 2 * (BRANCHES + 1) * 4 * self.vocabulary

    @property
    def scores_bytes_per_token(self) -> int:
        """Bytes per token of context in a batch: attention scores in f32 and f16, and a mask."""
        return CHUNK * (self.heads * (4 + 2) + 4)

    @property
    def state_bytes(self) -> int:
        """Saved states of the base and each adapter, half a context long, up to the runtime's limit."""
        states = len(self.adapters) + 1 if self.adapters else 0
        return min(states * self.kv_bytes_per_token * self.context_length // 2, CACHE_BYTES)

    @property
    def vocabulary_bytes(self) -> int:
        """Memory of the tokenizer's tables."""
        return self.vocabulary * VOCABULARY_BYTES_PER_TOKEN


def kv_bytes_per_token(header: GgufHeader) -> int:
    """Bytes of keys and values that one token adds, in f16, over all layers.

    Sliding-window layers (Gemma 3) count in full: the engine keeps all positions (`swa_full`), so that it can truncate.
    """
    heads = _number(header, "attention.head_count_kv", total=True)
    queries = _metadata(header, "attention.head_count")
    queries = max(queries) if isinstance(queries, Sequence) else queries
    default = _number(header, "embedding_length") // queries
    key = int(header.metadata.get(f"{header.architecture}.attention.key_length", default))
    value = int(header.metadata.get(f"{header.architecture}.attention.value_length", default))
    return heads * (key + value) * 2


def needs_of_header(
    header: GgufHeader,
    *,
    context_length: int,
    quantization: str | None = None,
    adapters: Mapping[str, AdapterSize] | None = None,
    merged: Sequence[str] = (),
    merged_quantization: str | None = None,
) -> Needs:
    """The needs of a base as its file is, or after quantization to `quantization`.

    `merged` names the adapters that are full models, which have the quantization of `quantization_of_merged`.
    UsageError for an unknown quantization.
    """
    chosen = None if quantization is None else quantization_named(quantization)
    sizes = {name: _tensor_bytes(t, header, chosen) for name, t in header.tensors.items()}
    counts = {name: math.prod(tensor.shape) for name, tensor in header.tensors.items()}
    looked_up = "token_embd.weight" if "output.weight" in header.tensors else ""
    head = "output.weight" if looked_up else "token_embd.weight"
    start = min((tensor.offset for tensor in header.tensors.values()), default=0)
    base_bytes = start + sum(sizes.values())
    main_type = header.main_type if chosen is None else TENSOR_TYPES[chosen.most]
    finer = quantization_of_merged(main_type, merged_quantization)
    merged_bytes = base_bytes
    if finer is not None:
        of_merged = quantization_named(finer)
        merged_bytes = start + sum(_tensor_bytes(tensor, header, of_merged) for tensor in header.tensors.values())
    return Needs(
        base_bytes=base_bytes,
        read_bytes=sum(sizes.values()) - sizes.get(looked_up, 0),
        read_parameters=sum(counts.values()) - counts.get(looked_up, 0),
        head_parameters=counts.get(head, 0),
        layers=_number(header, "block_count"),
        heads=_number(header, "attention.head_count"),
        embedding_length=_number(header, "embedding_length"),
        feed_forward_length=_number(header, "feed_forward_length"),
        vocabulary=_vocabulary(header),
        kv_bytes_per_token=kv_bytes_per_token(header),
        context_length=context_length,
        adapters=dict(adapters or {}),
        merged=dict.fromkeys(merged, merged_bytes),
    )


def needs_of_bundle(bundle: Path, *, context_length: int | None = None) -> Needs:
    """The needs of a bundle, from its manifest and the header of its base; weights are not read.

    Raises IncompatibleError if it has no GGUF base, and the errors of `read_manifest` and `read_header`.
    """
    manifest = read_manifest(bundle)
    if gguf.NAME not in manifest.base.files:
        raise IncompatibleError(f"bundle {manifest.name!r} has no GGUF base", f"build it with targets: [{gguf.NAME}]")
    header = read_header(resolve(bundle, manifest.base.files[gguf.NAME]))
    adapters: dict[str, AdapterSize] = {}
    merged: dict[str, int] = {}
    for name, entry in manifest.adapters.items():
        file_bytes = manifest.files[entry.files[gguf.NAME]].bytes if gguf.NAME in entry.files else 0
        if entry.shapes.get(gguf.NAME) == "merged":
            merged[name] = file_bytes
        else:
            adapters[name] = AdapterSize(file_bytes, len(entry.ranks))
    needs = needs_of_header(header, context_length=context_length or manifest.context_length, adapters=adapters)
    return replace(needs, merged=merged)


def estimate_needs(
    *,
    parameters: int,
    bits_per_weight: float,
    layers: int,
    kv_bytes_per_token: int,
    context_length: int,
    adapter_bytes: int = 0,
    adapter_modules: int = 0,
    vocabulary: int = 49152,
) -> Needs:
    """The needs of a base without a header; widths are guessed from the numbers of parameters and layers.

    Assumes that the embedding is tied to the output head.
    """
    # A transformer layer of width w has about 12 w^2 parameters if its feed-forward part is 3 w wide.
    width = math.isqrt(parameters // (12 * layers))
    size = math.ceil(parameters * bits_per_weight / 8)
    return Needs(
        base_bytes=size,
        read_bytes=size,
        read_parameters=parameters,
        head_parameters=vocabulary * width,
        layers=layers,
        heads=math.ceil(width / _HEAD_WIDTH),
        embedding_length=width,
        feed_forward_length=3 * width,
        vocabulary=vocabulary,
        kv_bytes_per_token=kv_bytes_per_token,
        context_length=context_length,
        adapters={"adapters": AdapterSize(adapter_bytes, adapter_modules)} if adapter_bytes else {},
    )


def lora_size(
    header: GgufHeader, rank: int, targets: Sequence[str] | str = "all-linear", *, dtype: str = "f16"
) -> AdapterSize:
    """The size of a LoRA adapter before it is trained; `targets` is PEFT's target_modules, `dtype` that of its file."""
    tensors = [tensor for tensor in header.tensors.values() if _is_target(_module_name(tensor.name, header), targets)]
    values = rank * sum(columns + rows for columns, rows in (t.shape for t in tensors))
    return AdapterSize(math.ceil(values * TENSOR_TYPES[dtype].bytes_per_value), len(tensors))


def _module_name(tensor_name: str, header: GgufHeader) -> str | None:
    """The Hugging Face name of the linear module with this tensor; None for other tensors."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor_name)
    if match is None or match[2] not in _MODULES:
        return None
    if match[2] == "ffn_up" and f"blk.{match[1]}.ffn_gate.weight" not in header.tensors:
        # Gate and up are one matrix.
        return f"model.layers.{match[1]}.mlp.gate_up_proj"
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}"


def _is_target(module: str | None, targets: Sequence[str] | str) -> bool:
    if module is None:
        return False
    if targets == "all-linear":
        return True
    names = (targets,) if isinstance(targets, str) else targets
    return any(module == target or module.endswith(f".{target}") for target in names)


def _tensor_bytes(tensor: TensorInfo, header: GgufHeader, quantization: Quantization | None) -> int:
    """Bytes of the tensor; half of the value and down projections get another type, so each counts with the mean."""
    if quantization is None:
        return tensor.nbytes
    if len(tensor.shape) < 2:
        return math.prod(tensor.shape) * 4
    columns = tensor.shape[0]
    rows = math.prod(tensor.shape[1:])
    head_name = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    if tensor.name == head_name:
        return rows * _row_bytes(quantization.head, columns)
    if tensor.name.endswith(("attn_v.weight", "ffn_down.weight")):
        return rows * (_row_bytes(quantization.most, columns) + _row_bytes(quantization.some, columns)) // 2
    return rows * _row_bytes(quantization.most, columns)


def _row_bytes(type_name: str, columns: int) -> int:
    kind = TENSOR_TYPES[type_name]
    if columns % kind.block:
        return _row_bytes(kind.narrow or "f16", columns)
    return columns // kind.block * kind.block_bytes


def _vocabulary(header: GgufHeader) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    embedding = header.tensors.get("token_embd.weight")
    return embedding.shape[1] if embedding is not None else 0


def _number(header: GgufHeader, key: str, *, total: bool = False) -> int:
    """An integer of the architecture; of a number per layer, the largest, or with `total` the sum over all layers."""
    value = _metadata(header, key)
    if isinstance(value, Sequence):
        return sum(map(int, value)) if total else max(map(int, value))
    return int(value) * (_number(header, "block_count") if total else 1)


def _metadata(header: GgufHeader, key: str) -> Any:  # noqa: ANN401 - a number, or one per layer
    full = f"{header.architecture}.{key}"
    if full not in header.metadata:
        raise IncompatibleError(f"the base's header has no {full}", "give a GGUF file of a language model")
    return header.metadata[full]
