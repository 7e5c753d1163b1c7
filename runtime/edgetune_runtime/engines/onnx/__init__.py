"""The engine of ONNX files, on onnxruntime."""
