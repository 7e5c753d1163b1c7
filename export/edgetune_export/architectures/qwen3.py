"""Qwen 3: LLaMA's layers with norms on the queries and keys of each head."""

from __future__ import annotations

from .base import Architecture

ARCHITECTURE = Architecture("qwen3", ("qwen3",), "Qwen3", norms_queries_and_keys=True)
