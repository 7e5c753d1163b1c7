"""Bases: found by name, made into the GGUF file that ships, and loaded in torch."""

from __future__ import annotations

from .finding import (
    ALIASES,
    ENCODER_TOKENIZER,
    ENCODER_TYPES,
    ENCODER_WEIGHTS,
    ENCODERS,
    Base,
    BaseSource,
    ImportanceSource,
    before_quantization,
    find,
    is_gguf,
    key_of_source,
    load_torch,
    locate,
    make,
    resolve,
    trained_context_length,
)

__all__ = [
    "ALIASES",
    "ENCODERS",
    "ENCODER_TOKENIZER",
    "ENCODER_TYPES",
    "ENCODER_WEIGHTS",
    "Base",
    "BaseSource",
    "ImportanceSource",
    "before_quantization",
    "find",
    "is_gguf",
    "key_of_source",
    "load_torch",
    "locate",
    "make",
    "resolve",
    "trained_context_length",
]
