"""LLaMA and models with the same layers: SmolLM 2, TinyLlama and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_runtime.formats.gguf_file import GgufHeader

from .base import Architecture, biases


class Llama(Architecture):
    """An architecture with LLaMA's tensors."""

    def config_entries(self, header: GgufHeader) -> Mapping[str, Any]:
        """Those of all, and the biases."""
        return {**super().config_entries(header), **biases(header)}


ARCHITECTURE = Llama("llama", ("llama",), "Llama", interleaves_rows=True, frequency_tensor="rope_freqs.weight")
