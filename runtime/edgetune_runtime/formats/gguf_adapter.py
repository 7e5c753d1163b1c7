"""Checks that a GGUF adapter, a LoRA or a prefix, fits its base, before llama.cpp reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .gguf_file import GgufHeader, TensorInfo
from .gguf_sizes import head_lengths, number, sliding_layers

ADAPTER_TYPES = ("f32", "f16", "bf16", "q8_0")
PREFIX_TYPES = ("f32", "f16")
INVOCATION_TOKENS = "adapter.alora.invocation_tokens"
"""Metadata key of the invocation tokens of an activated LoRA."""

_FLOAT32 = 6
_SAME_HEADS = "a prefix needs a base with the same number of heads in each layer"


@dataclass(frozen=True)
class CacheShape:
    """The shape of a base's KV cache: in each layer `heads` heads with keys of `key_size` and values of `value_size`.

    Layers in `sliding` attend only to the last `window` positions.
    """

    layers: int
    heads: int
    key_size: int
    value_size: int
    sliding: tuple[int, ...] = ()
    window: int = 0


def cache_shape(base: GgufHeader) -> CacheShape:
    """The shape of the base's KV cache; IncompatibleError when it is not the same in all layers."""
    if base.architecture == "gemma4":
        message = "the layers of a gemma4 base have keys and values of two sizes, or those of another layer"
        raise IncompatibleError(message, _SAME_HEADS)
    key = f"{base.architecture}.attention.head_count_kv"
    heads = base.metadata.get(key, number(base, "attention.head_count"))
    if not isinstance(heads, int):
        raise IncompatibleError(f"the base's {key} is {str(heads)[:80]!r}", _SAME_HEADS)
    sliding = sliding_layers(base)
    window = number(base, "attention.sliding_window") if sliding else 0
    return CacheShape(number(base, "block_count"), heads, *head_lengths(base), sliding, window)


def prefix_tensor(layer: int, which: str) -> str:
    """Name of the tensor with a layer's keys (`k`) or values (`v`) in a prefix file."""
    return f"blk.{layer}.prefix_{which}"


def check_prefix(adapter: GgufHeader, base: GgufHeader, name: str) -> int:
    """Check that a prefix file is valid and fits the base; returns the prefix's length in tokens.

    Same errors as `check_adapter`.
    """
    _check_metadata(adapter, base, name, "prefix")
    shape = cache_shape(base)
    sizes = {"k": shape.key_size, "v": shape.value_size}
    widths = {prefix_tensor(n, which): size for n in range(shape.layers) for which, size in sizes.items()}
    tokens = {tensor.shape[2] if len(tensor.shape) == 3 else 0 for tensor in adapter.tensors.values()}
    if len(tokens) != 1 or 0 in tokens:
        message = f"adapter {name!r} has no tensors, or tensors that do not have the same number of tokens"
        raise VerificationError(message, COPY_FILE_AGAIN)
    for tensor in adapter.tensors.values():
        if tensor.type.name not in PREFIX_TYPES:
            message = f"adapter {name!r} stores {tensor.name!r} as {tensor.type.name}"
            raise IncompatibleError(message, f"export it again as one of: {', '.join(PREFIX_TYPES)}")
        if tensor.shape[:2] != (widths.get(tensor.name), shape.heads):
            message = f"adapter {name!r} has {tensor.name!r} of shape {tensor.shape}, which does not fit the base"
            raise IncompatibleError(message, "use the base that the adapter was trained on")
    if len(adapter.tensors) != len(widths):
        message = f"adapter {name!r} has {len(adapter.tensors)} tensors, the base needs {len(widths)}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
    return tokens.pop()


def invocation_of(adapter: GgufHeader, name: str) -> tuple[int, ...]:
    """The invocation tokens of an activated LoRA, none for other adapters; VerificationError if they are invalid."""
    tokens = adapter.metadata.get(INVOCATION_TOKENS, ())
    if not isinstance(tokens, tuple) or not all(type(token) is int and token >= 0 for token in tokens):
        message = f"adapter {name!r} has invalid {INVOCATION_TOKENS}: {str(tokens)[:80]!r}"
        raise VerificationError(message, COPY_FILE_AGAIN)
    return tokens


def check_adapter(adapter: GgufHeader, base: GgufHeader, name: str) -> None:
    """Check that a LoRA file is valid and fits the base, so that llama.cpp can load it safely.

    Raises VerificationError when the file is invalid, and IncompatibleError when it is valid but not for this base.
    `name` is the adapter's name in errors.
    """
    _check_metadata(adapter, base, name, "lora")
    alpha, kind = (table.get("adapter.lora.alpha") for table in (adapter.metadata, adapter.value_types))
    # llama.cpp aborts the process for any other type.
    if kind != _FLOAT32 or not isinstance(alpha, float) or not math.isfinite(alpha):
        message = f"adapter {name!r} has adapter.lora.alpha {alpha!r}, which is not a finite float32"
        raise VerificationError(message, COPY_FILE_AGAIN)
    invocation_of(adapter, name)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in adapter.tensors.values():
        target, _, suffix = tensor.name.rpartition(".")
        if suffix not in ("lora_a", "lora_b"):
            message = f"adapter {name!r} has tensor {tensor.name!r}, which is not a LoRA matrix"
            raise IncompatibleError(message, "export it again, or merge it into the base")
        pairs.setdefault(target, {})[suffix] = tensor
    if not pairs:
        raise VerificationError(f"adapter {name!r} has no tensors", COPY_FILE_AGAIN)
    for target, pair in pairs.items():
        _check_pair(target, pair, base, name)


def _check_metadata(adapter: GgufHeader, base: GgufHeader, name: str, adapter_type: str) -> None:
    for key, expected in (("general.type", "adapter"), ("adapter.type", adapter_type)):
        actual = adapter.metadata.get(key)
        if actual != expected:
            message = f"adapter {name!r} has {key} {actual!r} instead of {expected!r}"
            raise VerificationError(message, "give a GGUF LoRA file, or a prefix file from edgetune")
    if adapter.architecture != base.architecture:
        message = f"adapter {name!r} is for architecture {adapter.architecture!r}, the base is {base.architecture!r}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")


def _check_pair(target: str, pair: Mapping[str, TensorInfo], base: GgufHeader, name: str) -> None:
    if len(pair) != 2:
        raise VerificationError(f"adapter {name!r} has only {next(iter(pair))} for {target!r}", COPY_FILE_AGAIN)
    a, b = pair["lora_a"], pair["lora_b"]
    for tensor in (a, b):
        if tensor.type.name not in ADAPTER_TYPES:
            message = f"adapter {name!r} stores {tensor.name!r} as {tensor.type.name}"
            raise IncompatibleError(message, f"export it again as one of: {', '.join(ADAPTER_TYPES)}")
    weight = base.tensors.get(target)
    if weight is None:
        message = f"adapter {name!r} changes {target!r}, which the base does not have"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
    if any(len(tensor.shape) != 2 for tensor in (a, b, weight)):
        message = f"adapter {name!r} changes {target!r}, which is not a matrix"
        raise IncompatibleError(message, "remove that module from the adapter's target modules")
    columns, rows = weight.shape
    # For the embedding, llama.cpp looks up rows of A by token, so both matrices are stored transposed.
    fits = a.shape[0] == b.shape[0] and (a.shape[1], b.shape[1]) == (rows, columns)
    if target != "token_embd.weight":
        fits = a.shape[1] == b.shape[0] and (a.shape[0], b.shape[1]) == (columns, rows)
    if not fits:
        message = f"adapter {name!r} has shapes {a.shape} and {b.shape} for {target!r} of shape {weight.shape}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
