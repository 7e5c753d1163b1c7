"""Gemma 3, text only: norms before and after each block, embeddings scaled by the root of their width, and
sliding-window layers between layers with full attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import number, sliding_layers

from .base import Architecture, check_settings

_LAYERS_OF_27B = 62


class _Gemma3(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """The converter writes neither how queries are scaled nor which layers use a sliding window."""
        layers, window = config["num_hidden_layers"], config["sliding_window"]
        sizes = {"gemma3.block_count": layers, "gemma3.attention.sliding_window": window}
        scalar = _scalar(layers, config["hidden_size"], config["num_attention_heads"], config.get("head_dim", 256))
        expected = {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": None,
            "layer_types": _kinds(GgufHeader({"general.architecture": "gemma3", **sizes}, {})),
        }
        check_settings({"query_pre_attn_scalar": 256, **config}, expected, self.gguf)

    def config_entries(self, header: GgufHeader) -> Mapping[str, Any]:
        """llama.cpp scales queries by the head size, but in the 27B model by the model's width per head. It has a
        default for which layers use a sliding window."""
        metadata = header.metadata
        scalar = _scalar(
            metadata["gemma3.block_count"],
            metadata["gemma3.embedding_length"],
            metadata["gemma3.attention.head_count"],
            metadata.get("gemma3.attention.key_length"),
        )
        return {**super().config_entries(header), "query_pre_attn_scalar": scalar, "layer_types": _kinds(header)}

    def builder_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """transformers 5 writes one entry per layer type, because their rotary embeddings differ; builder 0.18 also
        reads the entries of transformers 4."""
        rope = config["rope_parameters"]
        local = {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        return {"rope_parameters": {**rope, **rope["full_attention"], **local}}


def _kinds(header: GgufHeader) -> list[str]:
    sliding, layers = sliding_layers(header), range(number(header, "block_count"))
    return ["sliding_attention" if layer in sliding else "full_attention" for layer in layers]


def _scalar(layers: int, width: int, heads: int, head_size: int | None) -> int | None:
    return width // heads if layers == _LAYERS_OF_27B else head_size


ARCHITECTURE = _Gemma3(
    "gemma3",
    ("gemma3_text",),
    "Gemma3",
    norm_offset=1.0,
    norms_per_layer=4,
    norms_queries_and_keys=True,
    scales_embeddings=True,
)
