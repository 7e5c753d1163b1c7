"""Qwen 3.5, dense: gated delta nets in place of attention in most layers. Of multimodal checkpoints, the text part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import number, recurrent_layers

from .base import LINEAR_MODULES, Architecture, LinearModule, ValueHeads

_RECURRENT, _ATTENTION = "linear_attention", "full_attention"
_OF_ALL_HEADS = ("attn_qkv.weight", "ssm_conv1d.weight")
"""Tensors with rows of queries and keys before those of values."""
_OF_VALUES = ("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias")
_READS_VALUES = "ssm_out.weight"


class _Qwen35(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """IncompatibleError for layers of other kinds, and for value heads that are not a multiple of the key heads."""
        super().check_config(config)
        kinds = config.get("layer_types") or ()
        if len(kinds) != config["num_hidden_layers"] or not {*kinds} <= {_RECURRENT, _ATTENTION}:
            message = f"the base has layer_types {str(kinds)[:80]!r}, not {_RECURRENT} or {_ATTENTION} for each layer"
            raise IncompatibleError(message, "use a dense Qwen3.5, saved by transformers 5")
        _check_heads(config["linear_num_key_heads"], config["linear_num_value_heads"])

    def header_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """As llama.cpp's converter computes them."""
        return {
            "attention.recurrent_layers": tuple(kind == _RECURRENT for kind in config["layer_types"]),
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": config["linear_num_value_heads"],
            "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
        }

    def whole_config(self, header: GgufHeader) -> Mapping[str, Any]:
        """The config of a file, with the rotary embedding of text, whose positions are the same in all sections."""
        config, recurrent = super().whole_config(header), recurrent_layers(header)
        heads = number(header, "ssm.time_step_rank")
        rotated = number(header, "rope.dimension_count") / config["head_dim"]
        keys = number(header, "ssm.group_count")
        _check_heads(keys, heads)
        return {
            **config,
            "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": rotated},
            "linear_conv_kernel_dim": number(header, "ssm.conv_kernel"),
            "linear_key_head_dim": number(header, "ssm.state_size"),
            "linear_num_key_heads": keys,
            "linear_num_value_heads": heads,
            "linear_value_head_dim": number(header, "ssm.inner_size") // heads,
            "layer_types": [
                _RECURRENT if layer in recurrent else _ATTENTION for layer in range(number(header, "block_count"))
            ],
        }

    def value_heads(self, header: GgufHeader, tensor: str) -> ValueHeads | None:
        """ggml repeats the key heads one after another, transformers each of them in place."""
        groups, heads = number(header, "ssm.group_count"), number(header, "ssm.time_step_rank")
        _check_heads(groups, heads)
        if groups == heads or tensor not in {*_OF_ALL_HEADS, *_OF_VALUES, _READS_VALUES}:
            return None
        before = 2 * groups * number(header, "ssm.state_size") if tensor in _OF_ALL_HEADS else 0
        return ValueHeads(heads, groups, before, in_columns=tensor == _READS_VALUES)


def _check_heads(keys: int, values: int) -> None:
    if keys < 1 or values % keys:
        message = f"the base has {values} value heads, which is not a multiple of its {keys} key heads"
        raise IncompatibleError(message, "use a base that llama.cpp can run")


_DELTA_NET = (
    LinearModule("linear_attn.in_proj_qkv", "attn_qkv", "linear_attn.qkv_proj"),
    LinearModule("linear_attn.in_proj_z", "attn_gate", "linear_attn.z_proj"),
    LinearModule("linear_attn.in_proj_b", "ssm_beta", "linear_attn.b_proj"),
    LinearModule("linear_attn.in_proj_a", "ssm_alpha", "linear_attn.a_proj"),
    LinearModule("linear_attn.out_proj", "ssm_out", "linear_attn.out_proj"),
)

ARCHITECTURE = _Qwen35(
    "qwen35",
    ("qwen3_5_text",),
    "Qwen3_5",
    norm_offset=1.0,
    norms_queries_and_keys=True,
    linear_modules=(*LINEAR_MODULES, *_DELTA_NET),
    recurrent_block="linear_attn",
    not_in_int8=tuple(module.name for module in _DELTA_NET),
    transformers_reads_gguf=False,
    multimodal=("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    converter_options=("--no-mtp",),
)
