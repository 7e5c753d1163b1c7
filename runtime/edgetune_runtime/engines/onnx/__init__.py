"""The engine for ONNX files, on onnxruntime."""
