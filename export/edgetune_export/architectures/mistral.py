"""Mistral: the layers and GGUF name of LLaMA. llama.cpp does not use its sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import ENTRIES
from .llama import Llama


class _Mistral(Llama):
    def header_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A context no longer than the window, up to which the window has no effect."""
        return {ENTRIES[name]: length for name, length in self.converter_entries(config).items()}

    def converter_entries(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same, for the file."""
        window, length = config.get("sliding_window"), config.get("max_position_embeddings")
        return {"max_position_embeddings": window} if window and length and window < length else {}


ARCHITECTURE = _Mistral("llama", ("mistral",), "Mistral", interleaves_rows=True, frequency_tensor="rope_freqs.weight")
