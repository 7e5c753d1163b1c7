"""Mistral: the layers and GGUF name of LLaMA. llama.cpp does not use its sliding window."""

from __future__ import annotations

from dataclasses import replace

from . import llama

ARCHITECTURE = replace(llama.ARCHITECTURE, model_types=("mistral",), class_prefix="Mistral")
