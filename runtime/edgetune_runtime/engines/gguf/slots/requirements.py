"""Which bases can hold adapters in slots, and which of their tokens can choose one.

llama.cpp does not compare the tensors of a model from memory with its hyperparameters, so this is checked here.
Source, in llama.cpp: models/granite-switch.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from .native import BOOL, FLOAT32, STRING, UINT32

_ARCHITECTURE = "llama"
_ALIGNMENT = 32
"""ggml's for tensors in memory."""
_NORMAL, _CONTROL, _BYTE = 1, 3, 6
"""Types of tokens."""
_NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


class Sizes(NamedTuple):
    """The sizes of a base's matrices, and its number of layers."""

    layers: int
    width: int
    queries: int
    keys: int
    hidden: int
    tokens: int

    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Columns and rows of the matrices that adapters in slots can change, by their names within a layer."""
        return {
            "attn_q": (self.width, self.queries),
            "attn_k": (self.width, self.keys),
            "attn_v": (self.width, self.keys),
            "attn_output": (self.queries, self.width),
            "ffn_gate": (self.width, self.hidden),
            "ffn_up": (self.width, self.hidden),
            "ffn_down": (self.hidden, self.width),
        }


def sizes_of(base: GgufHeader) -> Sizes:
    """The sizes of a LLaMA base that `check_base` has accepted."""
    own = {key.removeprefix("llama."): value for key, value in base.metadata.items() if key.startswith("llama.")}
    heads, width = own["attention.head_count"], own["embedding_length"]
    size = own.get("attention.key_length", width // heads)
    keys = own.get("attention.head_count_kv", heads) * size
    tokens = len(base.metadata["tokenizer.ggml.tokens"])
    return Sizes(own["block_count"], width, heads * size, keys, own["feed_forward_length"], tokens)


def obstacle(base: GgufHeader) -> str | None:
    """Why a base that `check_base` has accepted cannot hold adapters in slots; None if it can."""
    if base.architecture != _ARCHITECTURE:
        return f"its architecture is {base.architecture}, and slots need {_ARCHITECTURE}"
    return next(_obstacles(base, sizes_of(base)), None)


def _obstacles(base: GgufHeader, sizes: Sizes) -> Iterator[str]:
    size = sizes.queries // base.metadata["llama.attention.head_count"]
    rotated = base.metadata.get("llama.rope.dimension_count", size)
    if rotated != size:
        yield f"it rotates {rotated} of the {size} values of a head, and slots need all"
    for key in base.metadata:
        if key.startswith("llama.") and base.value_types[key] not in (UINT32, FLOAT32, BOOL, STRING):
            yield f"{key[:80]} is a value of type {base.value_types[key]}, which no such base has"
    expected = _shapes(sizes)
    for name, tensor in base.tensors.items():
        if name not in expected:
            yield f"it has {name[:80]}, which slots have no place for"
        elif tensor.shape != expected[name]:
            yield f"{name[:80]} has the shape {tensor.shape} instead of {expected[name]}"
        elif tensor.offset % _ALIGNMENT:
            yield f"{name[:80]} is not at a multiple of {_ALIGNMENT} bytes"
    for name in expected:
        if name not in base.tensors and name != "output.weight":
            yield f"it has no {name}"
    for layer in range(sizes.layers):
        kinds = [base.tensors[f"blk.{layer}.attn_{which}.weight"].type.name for which in "qkv"]
        if len({*kinds}) > 1:
            yield f"the types of q, k and v in layer {layer} are {', '.join(kinds)}, and slots need one"
    if not control_tokens(base):
        yield "each of its tokens can be in a text, and slots need some that cannot"


def slot_bytes(base: GgufHeader, rank: int, dtype: str = "f16") -> int:
    """Memory that the factors in one slot of this rank take; so much is also reserved, not taken, for the base."""
    sizes = sizes_of(base)
    values = sizes.layers * rank * sum(columns + rows for columns, rows in sizes.modules().values())
    return int(values * TENSOR_TYPES[dtype].bytes_per_value)


def control_tokens(base: GgufHeader) -> list[int]:
    """The tokens that no sequence has, and so can choose a slot: the safest first.

    These are the tokens of single bytes that UTF-8 does not use, then control tokens that the tokenizer's settings and
    the chat template do not name.
    """
    tokens: tuple[str, ...] = base.metadata["tokenizer.ggml.tokens"]
    kinds: tuple[int, ...] = base.metadata.get("tokenizer.ggml.token_type", ())
    if len(kinds) != len(tokens):
        return []
    byte_texts = {f"<0x{byte:02X}>" for byte in _NEVER_IN_UTF8}
    texts = {chr(byte) for byte in _NEVER_IN_UTF8} if base.metadata.get("tokenizer.ggml.model") == "gpt2" else set()
    named = {value for key, value in base.metadata.items() if key.endswith(("_token_id", "_token_ids"))}
    templates = "".join(str(value) for key, value in base.metadata.items() if key.startswith("tokenizer.chat_template"))
    bytes_, controls = [], []
    for token, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if (kind == _BYTE and text in byte_texts) or (kind == _NORMAL and text in texts):
            bytes_.append(token)
        elif kind == _CONTROL and token not in named and text not in templates:
            controls.append(token)
    return bytes_ + controls


def _shapes(sizes: Sizes) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor that a base can have."""
    embedding = (sizes.width, sizes.tokens)
    norms = {
        f"blk.{layer}.{which}_norm.weight": (sizes.width,) for layer in range(sizes.layers) for which in ("attn", "ffn")
    }
    matrices = {
        f"blk.{layer}.{module}.weight": shape
        for layer in range(sizes.layers)
        for module, shape in sizes.modules().items()
    }
    ends = {"token_embd.weight": embedding, "output.weight": embedding, "output_norm.weight": (sizes.width,)}
    return {**ends, **norms, **matrices}
