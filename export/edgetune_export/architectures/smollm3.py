"""SmolLM3: LLaMA's layers, but every fourth has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError

from .base import Architecture

_WITHOUT_ROTATION = 4


class _SmolLM3(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """GGUF files store neither layers without rotary embedding nor sliding windows; llama.cpp assumes defaults."""
        super().check_config(config)
        layers = int(config.get("num_hidden_layers") or 0)
        usual = [int(self.rotates(layer)) for layer in range(layers)]
        no_rope = config.get("no_rope_layers")
        if (no_rope or usual)[:layers] != usual or config.get("use_sliding_window"):
            message = "the base has a sliding window or other no_rope_layers than SmolLM3-3B, unsupported by llama.cpp"
            raise IncompatibleError(message, "use a base with the layers of SmolLM3-3B")

    def builder_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Mark all layers as rotary: builder 0.18 fails on the others when it builds for CPUs."""
        return {"no_rope_layers": [1] * int(config["num_hidden_layers"])}

    def rotates(self, layer: int) -> bool:
        """True except for every fourth layer."""
        return (layer + 1) % _WITHOUT_ROTATION != 0


ARCHITECTURE = _SmolLM3("smollm3", ("smollm3",), "SmolLM3", interleaves_rows=True, transformers_reads_gguf=False)
