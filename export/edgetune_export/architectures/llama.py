"""LLaMA and models with the same layers: SmolLM 2, TinyLlama and others."""

from __future__ import annotations

from .base import Architecture

ARCHITECTURE = Architecture("llama", ("llama",), "Llama", interleaves_rows=True, frequency_tensor="rope_freqs.weight")
