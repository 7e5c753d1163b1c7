"""The list of what a GGUF base may contain: architectures, hyperparameters with their bounds, and tokenizers.

llama.cpp aborts the process at a value that it does not expect, reads keys that no file of a supported architecture
has, and reads strings only up to a NUL. Standard library only.

Sources, in llama.cpp: `load_hparams` and `load_tensors` in llama-model.cpp, models/*.cpp, llama-vocab.cpp, and for the
keys that files have, its converter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import first_of

from .gguf_bounds import LAYERS, Array, Between
from .gguf_file import GgufHeader, read_header

_HEAD_SIZE = 2048
Allowed = Between | Array | Sequence[Any]

_FACTOR, _ROPE_FACTOR = Between(1e-6, 1e6), Between(0.0, 1e6)
_WIDTH = Between(1, 1 << 20)
_WINDOW, _EPSILON = Between(0, 1 << 24), Between(1e-12, 0.1)
_FLAG = Between(0, 1)
_COMMON: Mapping[str, Allowed] = {
    "vocab_size": Between(1, 1 << 20),
    "context_length": Between(1, 1 << 24),
    "embedding_length": Between(1, 1 << 16),
    "block_count": Between(1, LAYERS),
    "feed_forward_length": _WIDTH,
    "attention.head_count": Between(1, 1 << 10),
    "attention.head_count_kv": Between(1, 1 << 10),
    "attention.key_length": Between(1, _HEAD_SIZE),
    "attention.value_length": Between(1, _HEAD_SIZE),
    "attention.layer_norm_epsilon": _EPSILON,
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.causal": (True,),
    "attention.sliding_window": _WINDOW,
    "rope.dimension_count": Between(2, _HEAD_SIZE),
    "rope.freq_base": Between(1.0, 1e12),
    "rope.scale_linear": _ROPE_FACTOR,
    "rope.scaling.type": ("none", "linear", "yarn", "longrope"),
    "rope.scaling.factor": _ROPE_FACTOR,
    "rope.scaling.attn_factor": _FACTOR,
    "rope.scaling.original_context_length": Between(1, 1 << 24),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_log_multiplier": _ROPE_FACTOR,
    "rope.scaling.yarn_ext_factor": Between(-1.0, 1e6),
    "rope.scaling.yarn_attn_factor": Between(-1.0, 1e6),
    "rope.scaling.yarn_beta_fast": _ROPE_FACTOR,
    "rope.scaling.yarn_beta_slow": _ROPE_FACTOR,
    # No supported architecture has experts, or is an encoder.
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    # Only a description: files of the first LLaMA have it.
    "tensor_data_layout": ("Meta AI original pth",),
}
_REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_SLIDING: Mapping[str, Allowed] = {
    "attention.sliding_window_pattern": Array(_FLAG, _WINDOW),
    "rope.freq_base_swa": Between(1.0, 1e12),
}

ARCHITECTURES: Mapping[str, Mapping[str, Allowed]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {
        **_SLIDING,
        "final_logit_softcapping": Between(0.0, 1e6),
        "attn_logit_softcapping": Between(0.0, 1e6),
    },
    "gemma4": {
        "attention.sliding_window": Between(1, 1 << 24),
        "attention.sliding_window_pattern": Array(_FLAG),
        "attention.key_length_swa": Between(1, _HEAD_SIZE),
        "attention.value_length_swa": Between(1, _HEAD_SIZE),
        "attention.shared_kv_layers": Between(0, LAYERS),
        "embedding_length_per_layer_input": _WIDTH,
        "feed_forward_length": Array(_WIDTH, _WIDTH),
        "final_logit_softcapping": Between(0.0, 1e6),
        "rope.dimension_count_swa": Between(2, _HEAD_SIZE),
        "rope.freq_base_swa": Between(1.0, 1e12),
    },
    "smollm3": {},
    "granite": {
        "logit_scale": _FACTOR,
        "residual_scale": _FACTOR,
        "embedding_scale": _FACTOR,
        "attention.scale": _FACTOR,
        # Those of Granite 4's other models, which llama.cpp does not read for a dense one.
        "expert_shared_feed_forward_length": _WIDTH,
        "ssm.conv_kernel": _WIDTH,
        "ssm.state_size": _WIDTH,
        "ssm.group_count": _WIDTH,
        "ssm.inner_size": _WIDTH,
        "ssm.time_step_rank": _WIDTH,
    },
    "ernie4_5": {},
    "hunyuan-dense": {},
    "lfm2": {
        "attention.head_count_kv": Array(Between(0, 1 << 10)),
        "attention.sliding_window": (0,),
        "shortconv.l_cache": Between(2, 64),
    },
    "olmo2": _SLIDING,
    "phi3": {},
    "qwen35": {
        "attention.recurrent_layers": Array(_FLAG),
        "full_attention_interval": Between(1, LAYERS),
        "rope.dimension_sections": Array(Between(0, _HEAD_SIZE)),
        "ssm.conv_kernel": Between(2, 64),
        "ssm.state_size": Between(1, _HEAD_SIZE),
        "ssm.group_count": Between(1, 1 << 10),
        "ssm.inner_size": _WIDTH,
        "ssm.time_step_rank": Between(1, 1 << 10),
    },
}
"""The supported architectures, by their names in GGUF files, with the hyperparameters that only they have."""

_BYTE_LEVEL = "gpt2"
_KINDS = ("llama", _BYTE_LEVEL, "gemma4")
_ABORTS_AT_SPACES = "whitespace"
_MAX_TOKENS = 1 << 20
_TOKEN_TYPES = frozenset(range(7))
_TOKENIZER_KEYS = re.compile(
    r"chat_templates?(\..*)?|huggingface\.json|rwkv\.world"
    r"|ggml\.(model|pre|tokens|token_type|token_type_count|scores|merges|added_tokens|suppress_tokens"
    r"|precompiled_charsmap|add_\w+|remove_extra_whitespaces|normalizer\.\w+|\w+_token_ids?)"
)
_BLOCK = re.compile(r"blk\.([0-9]+)\.")
_NOT_OF_WEIGHTS = frozenset(("q8_1", "q8_k", "f64", "i64", "i32", "i16", "i8"))
"""Types that no weight has; vectors are f32."""


def read_base(path: Path) -> GgufHeader:
    """The header of the base at `path`; raises what `read_header` and `check_base` raise."""
    header = read_header(path)
    check_base(header, path)
    return header


def check_base(header: GgufHeader, path: Path) -> None:
    """Check that llama.cpp can load this base safely, from the header of the file at `path`.

    IncompatibleError for an architecture that is not supported, a Gemma 4 with other layers, or a Qwen 3.5 with layers
    for drafts; VerificationError, with up to three problems, for a hyperparameter, a tensor type or a tokenizer that no
    file of this architecture has, or that do not fit together.
    """
    check_vocabulary(header, path)
    # The larger ones, some of which have experts.
    if header.architecture == "gemma4" and header.metadata.get("gemma4.embedding_length_per_layer_input") == 0:
        message = f"{path} is a Gemma 4 without inputs for each layer, which is not supported"
        raise IncompatibleError(message, "use a Gemma 4 E2B or E4B")
    # llama.cpp's converter writes them by default.
    if header.architecture == "qwen35" and header.metadata.get("qwen35.nextn_predict_layers"):
        message = f"{path} has layers that predict drafts (MTP), which are not supported"
        raise IncompatibleError(message, "use a file converted with --no-mtp, or its Hugging Face folder")
    _refuse(list(_wrong_hyperparameters(header)), path)
    _refuse(list(_wrong_shapes(header)), path)


def check_vocabulary(header: GgufHeader, path: Path) -> None:
    """Check that llama.cpp can load the tokenizer of this base safely; errors as in `check_base`."""
    if header.architecture not in ARCHITECTURES:
        message = f"{path} has the architecture {header.architecture[:80]!r}, which is not supported"
        raise IncompatibleError(message, f"use a base with one of: {', '.join(ARCHITECTURES)}")
    _refuse(list(_wrong_tokenizer(header)), path)


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        message = f"{path} is not a base that llama.cpp can load safely: {first_of(problems)}"
        raise VerificationError(message, "copy the file again, or convert the base again with llama.cpp's converter")


def _wrong_hyperparameters(header: GgufHeader) -> Iterator[str]:
    own = f"{header.architecture}."
    allowed = {**_COMMON, **ARCHITECTURES[header.architecture]}
    for key in _REQUIRED:
        if own + key not in header.metadata:
            yield f"it has no {own}{key}"
    for key, value in header.metadata.items():
        if not key.startswith(own):
            continue
        bounds = allowed.get(key.removeprefix(own))
        if bounds is None:
            yield f"it has {key[:80]}, which {header.architecture} bases do not have"
        elif value not in bounds:
            expected = f"one of {', '.join(map(str, bounds))}" if isinstance(bounds, tuple) else bounds
            yield f"{key} is {str(value)[:80]!r}, not {expected}"


def _wrong_shapes(header: GgufHeader) -> Iterator[str]:
    """Where hyperparameters and tensors contradict each other; llama.cpp itself compares all other shapes."""
    own: dict[str, Any] = {key: header.metadata.get(f"{header.architecture}.{key}") for key in _COMMON}
    layers, width, heads = own["block_count"], own["embedding_length"], own["attention.head_count"]
    kv_heads = own["attention.head_count_kv"] or heads
    if isinstance(kv_heads, tuple):
        if len(kv_heads) != layers or len({*kv_heads} - {0}) != 1:
            yield f"{header.architecture}.attention.head_count_kv is not 0 or the same in each of {layers} layers"
            return
        kv_heads = max(kv_heads)
    size = own["attention.key_length"] or width // heads
    rotated = own["rope.dimension_count"] or size
    tokens = len(header.metadata["tokenizer.ggml.tokens"])
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape != (width, tokens):
        actual = "no token_embd.weight" if embedding is None else f"token_embd.weight of shape {embedding.shape}"
        yield f"it has {actual} for {tokens} tokens and {header.architecture}.embedding_length {width}"
    if own["vocab_size"] not in (None, tokens):
        yield f"{header.architecture}.vocab_size is {own['vocab_size']}, but there are {tokens} tokens"
    if {match[1] for match in map(_BLOCK.match, header.tensors) if match} != set(map(str, range(layers))):
        yield f"its blk.N tensors are not those of {header.architecture}.block_count {layers}"
    if heads % kv_heads or size != (own["attention.value_length"] or width // heads):
        yield f"{heads} heads do not share {kv_heads} heads of keys and values of the same size"
    if rotated % 2 or rotated > size:
        yield f"{header.architecture}.rope.dimension_count {rotated} does not fit heads of size {size}"
    sizes = _heads_in(header.architecture, heads, kv_heads)
    if more := _MORE_CHECKS.get(header.architecture):
        yield from more(header, layers, size)
    for tensor in header.tensors.values():
        kind = tensor.name.split(".")[-2] if tensor.name.endswith(".weight") and "." in tensor.name else ""
        if tensor.type.name in _NOT_OF_WEIGHTS or (len(tensor.shape) == 1 and tensor.type.name != "f32"):
            yield f"{tensor.name[:80]} is stored as {tensor.type.name}"
        if kind in sizes and tensor.shape[-1] != sizes[kind] * size:
            yield f"{tensor.name[:80]} of shape {tensor.shape} is not that of {sizes[kind]} heads of size {size}"


def _heads_in(architecture: str, heads: int, kv_heads: int) -> Mapping[str, int]:
    """How many heads the rows of each kind of matrix are; those that are not named are compared by llama.cpp."""
    if architecture == "gemma4":
        # Layers differ in the size of their heads.
        return {}
    if architecture == "qwen35":
        # Queries have a gate of the same size, and a delta net's `attn_qkv` is another matrix.
        return {"attn_q": 2 * heads, "attn_k": kv_heads, "attn_v": kv_heads}
    return {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads, "attn_qkv": heads + 2 * kv_heads}


def _wrong_delta_nets(header: GgufHeader, layers: int, size: int) -> Iterator[str]:
    """Sizes that llama.cpp reads without comparing them."""
    state, groups, heads, inner = (
        header.metadata.get(f"qwen35.ssm.{key}", 0)
        for key in ("state_size", "group_count", "time_step_rank", "inner_size")
    )
    if not groups or heads % groups or inner != heads * state:
        yield f"{heads} heads of size {state} in {groups} groups are not delta nets of qwen35.ssm.inner_size {inner}"
    flags = header.metadata.get("qwen35.attention.recurrent_layers")
    if isinstance(flags, tuple) and len(flags) != layers:
        yield f"qwen35.attention.recurrent_layers has {len(flags)} flags for {layers} layers"
    sections = header.metadata.get("qwen35.rope.dimension_sections")
    if sections and (len(sections) != 4 or not 0 < sum(sections) <= size):
        yield f"qwen35.rope.dimension_sections are not four, of 1 to {size} numbers of a head together"


def _wrong_sharing(header: GgufHeader, layers: int, size: int) -> Iterator[str]:
    """Layers that would share the keys and values of a layer of another kind, or of none: llama.cpp aborts."""
    own = {key.removeprefix("gemma4."): value for key, value in header.metadata.items()}
    flags, shared = own.get("attention.sliding_window_pattern", ()), own.get("attention.shared_kv_layers", 0)
    for key in ("attention.sliding_window_pattern", "feed_forward_length"):
        values = own.get(key, ())
        if isinstance(values, tuple) and len(values) != layers:
            yield f"gemma4.{key} has {len(values)} entries for {layers} layers"
    if [*map(bool, flags[: max(0, layers - shared)])][-2:] != [True, False]:
        yield f"the last two of {layers} layers before gemma4.attention.shared_kv_layers {shared} are not of both kinds"
    rotated = own.get("rope.dimension_count", size)
    # llama.cpp takes the size of the other layers where a header has none for those with a window.
    for kind, value, heads in (
        ("", rotated, size),
        ("_swa", own.get("rope.dimension_count_swa", rotated), own.get("attention.key_length_swa", size)),
    ):
        if value != heads:
            yield f"gemma4.rope.dimension_count{kind} is {value}, not the size {heads} of heads"


_MORE_CHECKS = {"gemma4": _wrong_sharing, "qwen35": _wrong_delta_nets}


def _wrong_tokenizer(header: GgufHeader) -> Iterator[str]:
    metadata = header.metadata
    for key in metadata:
        if key.startswith("tokenizer.") and not _TOKENIZER_KEYS.fullmatch(key.removeprefix("tokenizer.")):
            yield f"it has {key[:80]}, which tokenizers do not have"
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    if not _is_array(tokens, str) or not 0 < len(tokens) <= _MAX_TOKENS:
        yield "it has no list of tokens"
        return
    # As llama.cpp reads them.
    texts = {token.partition("\0")[0] or f"[EMPTY_{number}]" for number, token in enumerate(tokens)}
    if len(texts) != len(tokens):
        yield f"{len(tokens) - len(texts)} of its tokens are there twice"
    yield from _wrong_kind(metadata, texts)
    scores, types = (metadata.get(f"tokenizer.ggml.{key}", ()) for key in ("scores", "token_type"))
    if scores != () and not (_is_array(scores, float, len(tokens)) and all(map(math.isfinite, scores))):
        yield f"its scores are not finite numbers for {len(tokens)} tokens"
    if types != () and not (_is_array(types, int, len(tokens)) and _TOKEN_TYPES.issuperset(types)):
        yield f"its token types are not numbers from 0 to 6 for {len(tokens)} tokens"
    ids = Between(0, len(tokens) - 1)
    for key, value in metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and value not in ids:
            yield f"{key} is {str(value)[:80]}, which is not one of its {len(tokens)} tokens"


def _wrong_kind(metadata: Mapping[str, Any], texts: set[str]) -> Iterator[str]:
    """What a tokenizer of its kind lacks."""
    kind, merges = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.merges", ())
    if kind not in _KINDS:
        yield f"tokenizer.ggml.model is {str(kind)[:80]!r}, not one of {', '.join(_KINDS)}"
    if kind == _BYTE_LEVEL and metadata.get("tokenizer.ggml.pre") == _ABORTS_AT_SPACES:
        yield f"its pre-tokenizer is {_ABORTS_AT_SPACES!r}, which byte-level tokenizers do not have"
    # llama.cpp aborts the process at the first text without a token, or leaves it out.
    missing = [byte for byte in range(256) if kind != _BYTE_LEVEL and f"<0x{byte:02X}>" not in texts]
    if missing and kind in _KINDS:
        yield f"its SentencePiece tokenizer has no token for byte {missing[0]:#04x}"
    if not _is_array(merges, str):
        yield "its merges are not a list of texts"
    elif wrong := [merge for merge in merges if merge.find(" ", 1) < 1]:
        yield f"it has the merge {wrong[0][:80]!r}, which is not two texts"


def _is_array(values: object, kind: type, length: int | None = None) -> bool:
    """Whether it is an array of this kind, and length if one is given; all its values have the type of the first."""
    if not isinstance(values, tuple) or len(values) != (len(values) if length is None else length):
        return False
    return not values or type(values[0]) is kind
