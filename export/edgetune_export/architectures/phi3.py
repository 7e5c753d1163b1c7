"""Phi-3 with a context of 4k: q, k and v are one module, gate and up another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader

from .base import Architecture, LinearModule

_LINEAR_MODULES = (
    LinearModule("self_attn.qkv_proj", "attn_qkv", "self_attn.qkv_proj"),
    LinearModule("self_attn.o_proj", "attn_output", "self_attn.o_proj"),
    LinearModule("mlp.gate_up_proj", "ffn_up", "mlp.gate_up_proj"),
    LinearModule("mlp.down_proj", "ffn_down", "mlp.down_proj"),
)


class _Phi3(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """transformers reads neither scaled nor partial rotary embeddings from a GGUF file."""
        super().check_config(config)
        rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        if rope.get("long_factor") or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._unsupported()

    def config_entries(self, header: GgufHeader) -> Mapping[str, Any]:
        """The original context length, and a padding token only if the base has one.
        IncompatibleError as in `check_config`."""
        metadata = header.metadata
        width = metadata["phi3.embedding_length"] // metadata["phi3.attention.head_count"]
        if "rope_factors_long.weight" in header.tensors or metadata.get("phi3.rope.dimension_count", width) != width:
            raise self._unsupported()
        trained = metadata.get("phi3.rope.scaling.original_context_length", metadata["phi3.context_length"])
        padding = metadata.get("tokenizer.ggml.padding_token_id")
        entries = {"original_max_position_embeddings": trained, "pad_token_id": padding}
        return {**super().config_entries(header), **entries}

    def _unsupported(self) -> IncompatibleError:
        message = "the base is a Phi with scaled or partial rotary embeddings, which are not supported"
        return IncompatibleError(message, "use one with a context of 4k, such as Phi-3-mini-4k-instruct")


ARCHITECTURE = _Phi3("phi3", ("phi3",), "Phi3", linear_modules=_LINEAR_MODULES)
