"""Gemma 4 E2B and E4B: inputs for each layer, and last layers that attend to the keys and values of earlier ones. Of
multimodal checkpoints, the text part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import head_lengths, number, sharing_layers, sliding_layers

from .base import LINEAR_MODULES, Architecture, LinearModule, check_settings

_SLIDING, _WHOLE = "sliding_attention", "full_attention"
# Its share of a head that layers with full attention rotate is in no metadata, but in the tensor rope_freqs.
_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
_REMEDY = "use the text part of a Gemma 4 E2B or E4B, saved by transformers 5"


class _Gemma4(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """The larger models have experts, or layers whose values are their keys."""
        if config.get("enable_moe_block") or config.get("attention_k_eq_v"):
            unsupported = "experts" if config.get("enable_moe_block") else "layers whose values are their keys"
            raise IncompatibleError(f"the base has {unsupported}, which are not supported for gemma4", _REMEDY)
        kinds, shared = config.get("layer_types") or (), config.get("num_kv_shared_layers", 0)
        # llama.cpp takes these two for all layers that share.
        own = kinds[: len(kinds) - shared]
        if (
            len(kinds) != config["num_hidden_layers"]
            or not {*kinds} <= {_SLIDING, _WHOLE}
            or own[-2:] != [_SLIDING, _WHOLE]
        ):
            message = (
                f"the base has layer_types {str(kinds)[:80]!r}, not {_SLIDING} or {_WHOLE} for each layer, with one "
                f"of each before the {shared} that share keys and values"
            )
            raise IncompatibleError(message, _REMEDY)
        check_settings(config, _expected(config), self.gguf, _REMEDY)

    def header_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """As llama.cpp's converter computes them."""
        kinds, width, shared = config["layer_types"], config["intermediate_size"], config.get("num_kv_shared_layers", 0)
        widths = [width] * (len(kinds) - shared) + [width * 2] * shared
        size, sliding = _whole_head(config), config["head_dim"]
        return {
            "attention.key_length": size,
            "attention.value_length": size,
            "attention.key_length_swa": sliding,
            "attention.value_length_swa": sliding,
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": tuple(kind == _SLIDING for kind in kinds),
            **({"attention.shared_kv_layers": shared} if shared else {}),
            "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
            "feed_forward_length": tuple(widths) if config.get("use_double_wide_mlp") else width,
        }

    def config_entries(self, header: GgufHeader) -> Mapping[str, Any]:
        """None: `whole_config` has the sizes of heads."""
        return {}

    def whole_config(self, header: GgufHeader) -> Mapping[str, Any]:
        """The config of a file. In transformers, wider feed-forward blocks of the last layers are twice as wide."""
        own, widths = "gemma4.", header.metadata["gemma4.feed_forward_length"]
        sliding, layers = sliding_layers(header), number(header, "block_count")
        narrow = min(widths) if isinstance(widths, tuple) else widths
        theta = header.metadata.get(f"{own}rope.freq_base_swa", header.metadata[f"{own}rope.freq_base"])
        return {
            **super().whole_config(header),
            "head_dim": head_lengths(header, sliding=True)[0],
            "global_head_dim": head_lengths(header)[0],
            "layer_types": [_SLIDING if layer in sliding else _WHOLE for layer in range(layers)],
            "sliding_window": number(header, "attention.sliding_window"),
            "num_kv_shared_layers": len(sharing_layers(header)),
            "intermediate_size": narrow,
            "use_double_wide_mlp": isinstance(widths, tuple) and max(widths) > narrow,
            "hidden_size_per_layer_input": number(header, "embedding_length_per_layer_input"),
            "vocab_size_per_layer_input": header.tensors["token_embd.weight"].shape[1],
            "final_logit_softcapping": header.metadata.get(f"{own}final_logit_softcapping") or None,
            "rope_parameters": {
                _SLIDING: {"rope_type": "default", "rope_theta": theta},
                _WHOLE: {**_ROPE, "rope_theta": header.metadata[f"{own}rope.freq_base"]},
            },
        }

    def unused_tensors(self, header: GgufHeader) -> Collection[str]:
        """The frequencies, which `whole_config` knows, and keys and values that published checkpoints have for layers
        which share those of others."""
        kinds = ("attn_k", "attn_k_norm", "attn_v")
        return {
            "rope_freqs.weight",
            *(f"blk.{layer}.{kind}.weight" for layer in sharing_layers(header) for kind in kinds),
        }

    def logits_of(self, output: Any, config: Any) -> Any:  # noqa: ANN401 - a tensor, and transformers' configuration
        """Between minus and plus final_logit_softcapping."""
        cap = config.final_logit_softcapping
        return output if cap is None else (output / cap).tanh() * cap


def _whole_head(config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - of config.json
    """The head size of layers with full attention: an entry of its own, or one of each layer in newer folders."""
    sizes = [
        entries["head_dim"] for entries in (config.get("per_layer_config") or {}).values() if "head_dim" in entries
    ]
    return config.get("global_head_dim") or next(iter(sizes), 512)


def _expected(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries of config.json with what llama.cpp computes."""
    rope = config.get("rope_parameters") or {}
    thetas = {kind: {"rope_theta": (rope.get(kind) or {}).get("rope_theta")} for kind in (_SLIDING, _WHOLE)}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size_per_layer_input": config["vocab_size"],
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", **thetas[_SLIDING]},
            _WHOLE: {**_ROPE, **thetas[_WHOLE]},
        },
    }


ARCHITECTURE = _Gemma4(
    "gemma4",
    ("gemma4_text",),
    "Gemma4",
    norms_per_layer=5,
    norms_queries_and_keys=True,
    scales_embeddings=True,
    norm_names={"post_per_layer_input_layernorm": "post_per_layer_input_norm"},
    linear_modules=(
        *LINEAR_MODULES,
        LinearModule("per_layer_input_gate", "inp_gate", "per_layer_input_gate"),
        LinearModule("per_layer_projection", "proj", "per_layer_projection"),
    ),
    fixed_modules=("model.per_layer_model_projection",),
    embeddings_in_file=("model.embed_tokens_per_layer",),
    has_equal_caches=False,
    unchanged_logits={"final_logit_softcapping": None},
    transformers_reads_gguf=False,
    multimodal=("gemma4", "Gemma4ForConditionalGeneration"),
)
