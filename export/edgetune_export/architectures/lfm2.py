"""LFM2 and LFM2.5, dense: short convolutions in place of attention in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import number, recurrent_layers

from .base import Architecture, LinearModule

_CONVOLUTION, _ATTENTION = "conv", "full_attention"


class _Lfm2(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """llama.cpp's graph has no biases, and attends to all positions."""
        super().check_config(config)
        kinds = config.get("layer_types") or ()
        if len(kinds) != config["num_hidden_layers"] or not {*kinds} <= {_CONVOLUTION, _ATTENTION}:
            message = f"the base has layer_types {str(kinds)[:80]!r}, not {_CONVOLUTION} or {_ATTENTION} for each layer"
            raise IncompatibleError(message, "use an LFM2 or LFM2.5 of text, saved by transformers 4.54 or newer")
        if config.get("conv_bias") or config.get("sliding_window"):
            message = "the base has convolutions with biases or sliding-window attention, which are not supported"
            raise IncompatibleError(message, "use an LFM2 or LFM2.5 of text, such as LFM2.5-350M")

    def header_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The entries, computed as llama.cpp's converter does."""
        width = config.get("block_ff_dim") or config["intermediate_size"]
        if config.get("block_auto_adjust_ff_dim", True):
            multiple = config.get("block_multiple_of", 256)
            width = int(config.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
            width = multiple * ((width + multiple - 1) // multiple)
        heads = config["num_key_value_heads"]
        return {
            "feed_forward_length": width,
            "attention.head_count_kv": tuple(heads * (kind == _ATTENTION) for kind in config["layer_types"]),
            "shortconv.l_cache": config.get("conv_L_cache", 3),
        }

    def converter_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The converter has no defaults for these."""
        defaults = {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256}
        return {name: value for name, value in defaults.items() if name not in config}

    def whole_config(self, header: GgufHeader) -> Mapping[str, Any]:
        """The config of a file, whose feed-forward length is already the adjusted one."""
        config, recurrent = super().whole_config(header), recurrent_layers(header)
        layers = range(number(header, "block_count"))
        return {
            **config,
            "num_key_value_heads": number(header, "attention.head_count_kv"),
            "norm_eps": config["rms_norm_eps"],
            "conv_L_cache": number(header, "shortconv.l_cache"),
            "block_auto_adjust_ff_dim": False,
            "layer_types": [_CONVOLUTION if layer in recurrent else _ATTENTION for layer in layers],
        }


ARCHITECTURE = _Lfm2(
    "lfm2",
    ("lfm2",),
    "Lfm2",
    norms_queries_and_keys=True,
    norm_names={
        "operator_layernorm": "operator_norm",
        "ffn_layernorm": "ffn_norm",
        "q_norm": "q_layernorm",
        "k_norm": "k_layernorm",
        "norm": "embedding_norm",
    },
    linear_modules=(
        LinearModule("self_attn.q_proj", "attn_q", "self_attn.qkv_proj"),
        LinearModule("self_attn.k_proj", "attn_k", "self_attn.qkv_proj"),
        LinearModule("self_attn.v_proj", "attn_v", "self_attn.qkv_proj"),
        LinearModule("self_attn.out_proj", "attn_output", "self_attn.o_proj"),
        LinearModule("conv.in_proj", "shortconv.in_proj", "conv.in_proj"),
        LinearModule("conv.out_proj", "shortconv.out_proj", "conv.out_proj"),
        LinearModule("feed_forward.w1", "ffn_gate", "mlp.gate_up_proj"),
        LinearModule("feed_forward.w3", "ffn_up", "mlp.gate_up_proj"),
        LinearModule("feed_forward.w2", "ffn_down", "mlp.down_proj"),
    ),
    recurrent_block="conv",
    not_in_int8=("conv.in_proj",),
    transformers_reads_gguf=False,
)
