"""The engines for ONNX files, on onnxruntime."""

from edgetune_runtime.bundle import CLASSIFICATION, GENERATION

ENGINES = {GENERATION: "engine", CLASSIFICATION: "encoder"}
