"""Strict readers that check GGUF and ONNX files before native code reads them."""

BASE_FINGERPRINT = "edgetune.base_fingerprint"
"""Key of the metadata of GGUF adapters and ONNX graphs: the fingerprint of the base that they were made for."""
