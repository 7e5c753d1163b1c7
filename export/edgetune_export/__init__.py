"""Folds trained adapters, writes GGUF and ONNX files, and packs bundles."""

import os

# onnxruntime must send nothing to Microsoft from the host either, see `edgetune_runtime.engines.onnx.ort.library`.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
