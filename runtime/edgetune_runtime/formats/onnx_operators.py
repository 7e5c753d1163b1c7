"""The list of operators that an ONNX graph may have: those that the exporters write for decoders and encoders.

None of them has a graph of its own, which `onnx_wire` refuses, so no graph has loops or branches.
"""

from __future__ import annotations

from pathlib import Path

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import first_of

from .onnx_file import OnnxHeader

OPERATORS = frozenset((
    # Of onnxruntime-genai's builder, and of what edgetune adds to its graphs.
    "Add",
    "Cast",
    "Constant",
    "Gather",
    "Gelu",
    "LpNormalization",
    "MatMul",
    "Mul",
    "RMSNormalization",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Shape",
    "Sigmoid",
    "Slice",
    "Split",
    "Sub",
    "com.microsoft::CausalConvWithState",
    "com.microsoft::GatedRMSNorm",
    "com.microsoft::GatherBlockQuantized",
    "com.microsoft::GroupQueryAttention",
    "com.microsoft::LinearAttention",
    "com.microsoft::LinearAttentionGate",
    "com.microsoft::MatMulNBits",
    "com.microsoft::RotaryEmbedding",
    "com.microsoft::SkipSimplifiedLayerNormalization",
    # Of PyTorch's exporter.
    "And",
    "Attention",
    "Concat",
    "CumSum",
    "Div",
    "Equal",
    "Expand",
    "GatherElements",
    "GatherND",
    "GreaterOrEqual",
    "LayerNormalization",
    "Max",
    "Not",
    "Range",
    "Squeeze",
    "Tanh",
    "Transpose",
    "Unsqueeze",
    "Where",
))  # fmt: skip
"""Operators by name, after their domain unless it is that of ONNX itself."""


def check_operators(header: OnnxHeader, path: Path) -> None:
    """VerificationError, with up to three of them, for operators that are not in the list."""
    unknown = sorted(operator[:80] for operator in header.ops - OPERATORS)
    if unknown:
        message = f"{path} has operators that no exporter writes: {first_of(unknown)}"
        raise VerificationError(message, "build the bundle again")
