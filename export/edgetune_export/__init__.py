"""Folds trained adapters, writes GGUF and ONNX files, and packs bundles."""
