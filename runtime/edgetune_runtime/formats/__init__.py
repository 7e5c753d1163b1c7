"""Strict readers that check GGUF and ONNX files before native code reads them."""
