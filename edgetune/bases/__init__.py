"""Bases: found by name, read, made into the GGUF file that ships, and loaded in torch with that file's weights.

Training and parity use the dequantized weights of that same file, so adapters are trained for what the device runs.
"""

from .loading import load_torch
from .locating import ALIASES, ENCODER_TYPES, ENCODERS, is_encoder, is_gguf, locate
from .making import Base, ImportanceSource, before_quantization, key_of_source, make, resolve
from .source import ENCODER_WEIGHTS, BaseSource, find, trained_context_length

__all__ = [
    "ALIASES",
    "ENCODERS",
    "ENCODER_TYPES",
    "ENCODER_WEIGHTS",
    "Base",
    "BaseSource",
    "ImportanceSource",
    "before_quantization",
    "find",
    "is_encoder",
    "is_gguf",
    "key_of_source",
    "load_torch",
    "locate",
    "make",
    "resolve",
    "trained_context_length",
]
