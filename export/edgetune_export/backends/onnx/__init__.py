"""All that is known about writing ONNX."""
