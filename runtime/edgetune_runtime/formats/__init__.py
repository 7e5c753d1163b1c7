"""Files of GGUF and ONNX, read and checked before a native library does."""
