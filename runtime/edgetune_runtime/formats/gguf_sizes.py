"""Sizes of a language model, from the header of its GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune_runtime.errors import IncompatibleError

from .gguf_file import GgufHeader

_SHARED = "attention.shared_kv_layers"
_SLIDING_WINDOW_PATTERN = {"gemma3": 6, "gemma4": 6}
"""Architectures with sliding-window layers, and the default interval of the layers with full attention: every sixth.

Other architectures have such layers too, but llama.cpp runs them with full attention. Training reads this through
`sliding_layers`.
"""


def number(header: GgufHeader, key: str) -> int:
    """An integer of the architecture; of a number per layer, the largest.

    IncompatibleError if the header has no such number.
    """
    value = _metadata(header, key)
    return max(map(int, value)) if isinstance(value, Sequence) else int(value)


def kv_values_per_token(header: GgufHeader) -> int:
    """Numbers in the keys and values that one token adds, over all layers that have their own.

    Sliding-window layers (Gemma 3) count in full: the engine keeps all positions (`swa_full`), so that it can truncate.
    """
    heads, layers = _metadata(header, "attention.head_count_kv"), number(header, "block_count")
    per_layer = heads if isinstance(heads, Sequence) else [heads] * layers
    sliding = sliding_layers(header)
    without = {*recurrent_layers(header), *sharing_layers(header)}
    return sum(
        int(count) * sum(head_lengths(header, sliding=layer in sliding))
        for layer, count in enumerate(per_layer)
        if layer not in without
    )


def sliding_layers(base: GgufHeader) -> tuple[int, ...]:
    """The layers that attend only to a window of positions in llama.cpp; IncompatibleError without a `block_count`."""
    layers, window = number(base, "block_count"), base.metadata.get(f"{base.architecture}.attention.sliding_window")
    usual = _SLIDING_WINDOW_PATTERN.get(base.architecture)
    if usual is None or not isinstance(window, int) or window < 1:
        return ()
    pattern = base.metadata.get(f"{base.architecture}.attention.sliding_window_pattern", usual)
    if isinstance(pattern, tuple):
        return tuple(layer for layer, slides in enumerate(pattern[:layers]) if slides)
    return tuple(layer for layer in range(layers) if pattern == 0 or (layer + 1) % pattern)


def sharing_layers(header: GgufHeader) -> range:
    """The layers, always the last ones, that attend to the keys and values of an earlier layer (Gemma 4)."""
    layers, shared = number(header, "block_count"), header.metadata.get(f"{header.architecture}.{_SHARED}", 0)
    return range(layers - int(shared), layers)


def recurrent_layers(header: GgufHeader) -> frozenset[int]:
    """The layers that have a recurrent state in place of keys and values, as llama.cpp finds them."""
    if header.architecture == "lfm2":
        flags = [not heads for heads in _metadata(header, "attention.head_count_kv")]
    elif header.architecture == "qwen35":
        interval = header.metadata.get("qwen35.full_attention_interval", 4)
        usual = [bool((layer + 1) % interval) for layer in range(number(header, "block_count"))]
        flags = header.metadata.get("qwen35.attention.recurrent_layers", usual)
    else:
        flags = []
    return frozenset(layer for layer, is_recurrent in enumerate(flags) if is_recurrent)


def recurrent_values(header: GgufHeader) -> int:
    """Numbers in the recurrent state of one sequence, over all layers, whatever its length."""
    layers = recurrent_layers(header)
    if not layers:
        return 0
    # Of a short convolution the inputs of the tokens before the next one, and of a delta net a matrix per head.
    if header.architecture == "lfm2":
        per_layer = number(header, "embedding_length") * (number(header, "shortconv.l_cache") - 1)
    else:
        kernel, size, groups, inner = (
            number(header, f"ssm.{key}") for key in ("conv_kernel", "state_size", "group_count", "inner_size")
        )
        per_layer = (kernel - 1) * (inner + 2 * groups * size) + size * inner
    return len(layers) * per_layer


def recurrent_inputs_per_token(header: GgufHeader) -> int:
    """Numbers that the convolutions of all layers read per token, if the states are the last ones of these; else 0."""
    return len(recurrent_layers(header)) * number(header, "embedding_length") if header.architecture == "lfm2" else 0


def head_lengths(header: GgufHeader, *, sliding: bool = False) -> tuple[int, int]:
    """The numbers in a key and in a value of one head; those of `sliding` layers may be fewer (Gemma 4)."""
    own, default = header.architecture, number(header, "embedding_length") // number(header, "attention.head_count")
    key, value = (header.metadata.get(f"{own}.attention.{which}_length", default) for which in ("key", "value"))
    if sliding:
        key = header.metadata.get(f"{own}.attention.key_length_swa", key)
        value = header.metadata.get(f"{own}.attention.value_length_swa", value)
    return int(key), int(value)


def rotated_lengths(header: GgufHeader) -> tuple[int, ...]:
    """How many numbers of a query or a key are rotated by its position, for each kind of layer with its own angles."""
    own, (key, _) = header.architecture, head_lengths(header)
    lengths = [header.metadata.get(f"{own}.rope.dimension_count", key)]
    if sliding_layers(header):
        key, _ = head_lengths(header, sliding=True)
        lengths.append(header.metadata.get(f"{own}.rope.dimension_count_swa", key))
    return tuple(map(int, lengths))


def vocabulary(header: GgufHeader) -> int:
    """The number of tokens; 0 if the header has neither tokens nor an embedding."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    embedding = header.tensors.get("token_embd.weight")
    return embedding.shape[1] if embedding is not None else 0


def data_start(header: GgufHeader) -> int:
    """Bytes of the file before its weights."""
    return min((tensor.offset for tensor in header.tensors.values()), default=0)


def _metadata(header: GgufHeader, key: str) -> Any:  # noqa: ANN401 - a number, or one per layer
    full = f"{header.architecture}.{key}"
    if full not in header.metadata:
        raise IncompatibleError(f"the base's header has no {full}", "give a GGUF file of a language model")
    return header.metadata[full]
