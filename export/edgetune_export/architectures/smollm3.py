"""SmolLM3: LLaMA's layers, of which every fourth has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.errors import IncompatibleError

from .base import Architecture

_WITHOUT_ROTATION = 4


class _SmolLM3(Architecture):
    def check_config(self, config: Mapping[str, Any]) -> None:
        """A GGUF file says neither which layers rotate nor which attend to a window; llama.cpp knows the usual ones."""
        layers = int(config.get("num_hidden_layers", 0))
        usual = [int(self.rotates(layer)) for layer in range(layers)]
        given = config.get("no_rope_layers")
        if (given or usual)[:layers] != usual or config.get("use_sliding_window"):
            message = "the base rotates other layers than every SmolLM3, or attends to a window"
            raise IncompatibleError(message, "give a base that llama.cpp runs as it was trained")

    def builder_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Builder 0.18 fails on layers that do not rotate, for processors, so it is told that all do."""
        return {"no_rope_layers": [1] * int(config["num_hidden_layers"])}

    def rotates(self, layer: int) -> bool:
        """All but every fourth."""
        return (layer + 1) % _WITHOUT_ROTATION != 0


ARCHITECTURE = _SmolLM3("smollm3", ("smollm3",), "SmolLM3RMSNorm", interleaves_rows=True, transformers_reads_gguf=False)
