"""The engines for ONNX files, on onnxruntime."""

from edgetune_runtime.bundle import CLASSIFICATION, GENERATION

ENGINES = {GENERATION: "engine", CLASSIFICATION: "encoder"}
NAME = __name__.rpartition(".")[2]
"""Name of the engine and its format, which is that of the folder."""
KV_TYPES: tuple[str, ...] = ("f32",)
"""Data types that keys and values can have, the default first."""
