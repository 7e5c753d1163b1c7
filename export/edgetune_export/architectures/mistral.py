"""Mistral: LLaMA's layers, and llama.cpp calls them so. What it reads of a window of attention it leaves out."""

from __future__ import annotations

from dataclasses import replace

from . import llama

ARCHITECTURE = replace(llama.ARCHITECTURE, model_types=("mistral",), rms_norm="MistralRMSNorm")
