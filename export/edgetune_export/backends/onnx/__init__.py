"""All that is known about writing ONNX, for onnxruntime."""

from edgetune_runtime.bundle import CLASSIFICATION, GENERATION

from edgetune_export.backends.format import Format

FORMAT = Format(
    # onnxruntime-genai takes no other than f32 for a float32 graph.
    adapter_dtypes=("f32", "f16"),
    dtype_key="onnx_dtype",
    packages=("onnxruntime", "onnxruntime-genai"),
    tasks=(GENERATION, CLASSIFICATION),
    # Block scales lie apart, and the projections of adapter slots are packed: measured on builds of 135M and 506M.
    base_factor=1.15,
    adapter_factor=1.25,
    # With the process beside it that makes the graph.
    process_mb=1250.0,
)
