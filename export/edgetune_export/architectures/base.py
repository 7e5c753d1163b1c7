"""The description of an architecture: its names, linear modules, norms, and corrections for transformers and ONNX."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import head_lengths

ENTRIES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
"""GGUF keys, after the architecture's name, of entries of config.json."""


@dataclass(frozen=True)
class LinearModule:
    """A linear module of each layer: its name in transformers, its tensor in GGUF files, and the `product` of an ONNX
    graph that computes it, alone or fused with the modules that read the same inputs."""

    name: str
    tensor: str
    product: str


@dataclass(frozen=True)
class ValueHeads:
    """Value heads that a GGUF file has in another order: heads that read the same keys are `groups` heads apart,
    where they are neighbours in transformers.

    They follow `before` rows that keep their places; or they are `in_columns`.
    """

    heads: int
    groups: int
    before: int = 0
    in_columns: bool = False


LINEAR_MODULES = (
    LinearModule("self_attn.q_proj", "attn_q", "self_attn.qkv_proj"),
    LinearModule("self_attn.k_proj", "attn_k", "self_attn.qkv_proj"),
    LinearModule("self_attn.v_proj", "attn_v", "self_attn.qkv_proj"),
    LinearModule("self_attn.o_proj", "attn_output", "self_attn.o_proj"),
    LinearModule("mlp.gate_proj", "ffn_gate", "mlp.gate_up_proj"),
    LinearModule("mlp.up_proj", "ffn_up", "mlp.gate_up_proj"),
    LinearModule("mlp.down_proj", "ffn_down", "mlp.down_proj"),
)
"""Those of LLaMA; `shape.py` reads their sizes from a header."""
_KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj")
_HEAD_MULTIPLES = {"onnx": 8}
"""Formats whose engine needs heads of a multiple of so many values."""
OUTPUT_LAYER = "lm_head"
"""The name of the linear module after the layers."""


def check_settings(config: Mapping[str, Any], expected: Mapping[str, Any], gguf: str, remedy: str = "") -> None:
    """IncompatibleError if config.json has a setting with another value than llama.cpp takes for all such bases."""
    wrong = next((key for key, value in expected.items() if config.get(key, value) != value), None)
    if wrong:
        message = f"the base has {wrong} {str(config.get(wrong))[:80]!r}, which is not supported for {gguf}"
        raise IncompatibleError(message, remedy or f"use a base with {str(expected[wrong])[:80]!r}")


def biases(header: GgufHeader) -> Mapping[str, bool]:
    """The entries of transformers' config for biases, which a file has as tensors."""
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


@dataclass(frozen=True)
class Architecture:
    """An architecture of decoders. The defaults are those of LLaMA.

    `gguf` is the name in GGUF files, `model_types` the names in config.json, `class_prefix` the start of its classes'
    names in transformers. Norms multiply by their weights plus `norm_offset`; GGUF files contain the sum.
    """

    gguf: str
    model_types: tuple[str, ...]
    class_prefix: str
    norm_offset: float = 0.0
    norms_per_layer: int = 2
    """Norms of a layer over vectors of the model's width."""
    norms_queries_and_keys: bool = False
    scales_embeddings: bool = False
    """Whether embeddings are multiplied by the square root of their width, which onnxruntime-genai's builder rounds."""
    norm_names: Mapping[str, str] = field(default_factory=dict)
    """Its names of norms that onnxruntime-genai's builder calls as most architectures do."""
    interleaves_rows: bool = False
    """Whether llama.cpp's rotary embedding rotates neighbouring values of a head, where Hugging Face rotates the two
    halves; the rows of q and k in GGUF files, and the keys, then have another order (see layout.py)."""
    linear_modules: tuple[LinearModule, ...] = LINEAR_MODULES
    fixed_modules: tuple[str, ...] = ()
    """Linear modules outside the layers, before the output layer, to which llama.cpp applies no adapter."""
    embeddings_in_file: tuple[str, ...] = ()
    """Embeddings beside that of tokens, too large for memory, of which training reads rows from the file."""
    has_equal_caches: bool = True
    """Whether all layers that attend have keys and values of their own, and of the same size."""
    recurrent_block: str = ""
    """In layers with a recurrent state, the block in place of `self_attn`; empty if all layers attend."""
    not_in_int8: tuple[str, ...] = ()
    """Modules that training in int8 leaves in float32, because their outputs are multiplied by each other."""
    split_modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Modules of a folder that the converter splits into equal parts by rows, with the tensors of these."""
    multimodal: tuple[str, str] = ("", "")
    """The `model_type` and the class of checkpoints that have such a model as their text part."""
    converter_options: tuple[str, ...] = ()
    """Options of llama.cpp's converter."""
    unchanged_logits: Mapping[str, Any] = field(default_factory=dict)
    """Entries of transformers' config with which `logits_of` changes nothing."""
    frequency_tensor: str = ""
    """The tensor by whose values llama.cpp divides the frequencies of the rotary embedding, where a file has it."""
    transformers_reads_gguf: bool = True
    """Whether transformers can read the config from a GGUF file's metadata."""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Formats that do not support such a base, with the reason."""

    @property
    def model_class(self) -> str:
        """The class in transformers, which config.json names in `architectures`."""
        return f"{self.class_prefix}ForCausalLM"

    def text_part(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of the text part of a config.json: those within it, if it is multimodal."""
        within = config.get("text_config")
        return {**config, **within} if isinstance(within, dict) else config

    @property
    def has_other_modules(self) -> bool:
        """Whether its linear modules are others than LLaMA's."""
        return self.linear_modules != LINEAR_MODULES

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers have a recurrent state in place of attention."""
        return bool(self.recurrent_block)

    @property
    def rms_norm(self) -> str:
        """The class of its norms in transformers."""
        return f"{self.class_prefix}RMSNorm"

    def modules_of(self, *, is_recurrent: bool, shares_keys: bool) -> Iterator[LinearModule]:
        """The linear modules of a layer, which has either attention or a recurrent state; with `shares_keys`, it has
        the keys and values of another layer."""
        absent = "self_attn" if is_recurrent else self.recurrent_block
        for module in self.linear_modules:
            if module.name.partition(".")[0] != absent and not (shares_keys and module.name in _KEYS_AND_VALUES):
                yield module

    def frequency_factor(self, header: GgufHeader) -> float:
        """The number by which llama.cpp divides all frequencies of the rotary embedding.

        IncompatibleError if they are scaled in another way than linearly.
        """
        metadata, own = header.metadata, f"{self.gguf}.rope."
        kind = metadata.get(f"{own}scaling.type", "linear")
        if kind == "none":
            return 1.0
        if kind != "linear":
            message = f"the base scales its rotary embedding ({kind}), which is not supported"
            raise IncompatibleError(message, "use a base without scaled rotary embeddings")
        # A factor of 0 stands for none.
        return float(metadata.get(f"{own}scaling.factor", metadata.get(f"{own}scale_linear", 0.0))) or 1.0

    def check_header(self, header: GgufHeader, formats: Sequence[str]) -> None:
        """IncompatibleError if the rotary embedding is scaled in an unsupported way, or if one of the formats does not
        support such a base."""
        self.frequency_factor(header)
        for name in formats:
            if name in self.refusals:
                message = f"{name} does not support bases of architecture {self.gguf!r}: {self.refusals[name]}"
                raise IncompatibleError(message, f"leave out {name}")
            multiple = _HEAD_MULTIPLES.get(name, 1)
            for size in (*head_lengths(header), *head_lengths(header, sliding=True)):
                if size % multiple:
                    message = f"{name} does not support bases with heads of {size} values, only multiples of {multiple}"
                    raise IncompatibleError(message, f"leave out {name}")

    def check_config(self, config: Mapping[str, Any]) -> None:
        """IncompatibleError if a model with this config.json would compute something else as a GGUF file."""
        check_settings(config, {"hidden_act": "silu", "use_sliding_window": False}, self.gguf)

    def config_entries(self, header: GgufHeader) -> Mapping[str, Any]:
        """Config entries that transformers does not read from a GGUF file in the way that llama.cpp does."""
        head_dim = header.metadata.get(f"{self.gguf}.attention.key_length")
        return {"head_dim": head_dim} if isinstance(head_dim, int) else {}

    def whole_config(self, header: GgufHeader) -> Mapping[str, Any]:
        """All entries of transformers' config, for architectures that it cannot read from a GGUF file."""
        metadata, own = header.metadata, f"{self.gguf}."
        entries = {name: metadata[own + key] for name, key in ENTRIES.items() if own + key in metadata}
        tokens = {f"{which}_token_id": metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "eos")}
        return {
            **entries,
            **tokens,
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
            "vocab_size": header.tensors["token_embd.weight"].shape[1],
            "rms_norm_eps": metadata[f"{own}attention.layer_norm_rms_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": metadata[f"{own}rope.freq_base"]},
            "tie_word_embeddings": "output.weight" not in header.tensors,
            **biases(header),
        }

    def unused_tensors(self, header: GgufHeader) -> Collection[str]:
        """Tensors that a file may have and that transformers' model does without."""
        return {self.frequency_tensor}

    def logits_of(self, output: Any, _config: Any) -> Any:  # noqa: ANN401 - a tensor, and transformers' configuration
        """The logits that a model of this config computes from those that its output layer returns."""
        return output

    def header_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hyperparameters that llama.cpp's converter computes from config.json, by their keys after the architecture's
        name."""
        return {}

    def converter_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Entries of config.json that llama.cpp's converter needs in another form than transformers writes."""
        return {}

    def builder_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Entries of config.json that onnxruntime-genai's builder needs in another form than transformers writes.

        Where a class is multimodal, it knows that one only, of which it writes the text part.
        """
        return {"architectures": [self.multimodal[1]]} if self.multimodal[1] else {}

    def value_heads(self, _header: GgufHeader, _tensor: str) -> ValueHeads | None:
        """The value heads in the rows, or columns, of a tensor of a layer, named without its layer, which llama.cpp's
        converter puts into another order; None if it keeps their order."""
        return None

    def rotates(self, _layer: int) -> bool:
        """Whether a layer's attention has a rotary embedding."""
        return True
