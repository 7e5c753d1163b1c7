"""Qwen 2 and 2.5: LLaMA's layers with biases on q, k and v."""

from __future__ import annotations

from .base import Architecture

ARCHITECTURE = Architecture("qwen2", ("qwen2",), "Qwen2")
