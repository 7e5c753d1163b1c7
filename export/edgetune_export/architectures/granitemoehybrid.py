"""Granite 4 and its nano models, dense only: llama.cpp's converter writes them as Granite 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError

from .base import Architecture

# In folders from before transformers 5, and after.
_ATTENTION = ("attention", "full_attention")


class _GraniteMoeHybrid(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """A Granite file stores neither Mamba layers nor experts, and llama.cpp rotates keys in all of its layers."""
        super().check_config(config)
        attends = [kind in _ATTENTION for kind in config.get("layer_types") or ()]
        dense = not config.get("num_local_experts", 1) and all(attends) and len(attends) == config["num_hidden_layers"]
        rotates = config.get("position_embedding_type") == "rope"
        same_width = config.get("shared_intermediate_size") == config.get("intermediate_size")
        if not (dense and rotates and same_width):
            message = "the base has Mamba layers, experts or no rotary embedding, which are not supported"
            raise IncompatibleError(message, "use a dense Granite 4, such as granite-4.0-350m or granite-4.0-1b")

    def converter_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The converter takes layers of the kind that transformers 5 writes for Mamba layers."""
        return {"layer_types": [_ATTENTION[0]] * int(config["num_hidden_layers"]), "num_experts_per_tok": 0}


ARCHITECTURE = _GraniteMoeHybrid(
    "granite",
    ("granitemoehybrid",),
    "GraniteMoeHybrid",
    interleaves_rows=True,
    split_modules={"shared_mlp.input_linear": ("ffn_gate", "ffn_up"), "shared_mlp.output_linear": ("ffn_down",)},
    transformers_reads_gguf=False,
)
