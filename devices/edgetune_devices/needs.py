"""The needs of a base as its file is, or after quantization, from its header."""

from __future__ import annotations

import math
from dataclasses import replace

from edgetune_runtime.engines import gguf, load_needs, names_with_needs
from edgetune_runtime.engines.gguf.needs import needs_of_sizes
from edgetune_runtime.engines.needs import Needs
from edgetune_runtime.formats.gguf_file import PER_LAYER_EMBEDDING, GgufHeader, TensorInfo
from edgetune_runtime.formats.gguf_sizes import number, rotated_lengths
from edgetune_runtime.formats.quantization import TENSOR_TYPES, Quantization, TensorType, quantization_named

_UNCHANGED = "per_layer_model_proj.weight"
"""A matrix that llama.cpp does not quantize."""
# A scale in f32 for each block of 32 weights.
_ONNX_SCALE_BITS = 1
_FLOAT_BITS = 32


def engine_of(target: str) -> str:
    """The engine of a format; one for which nothing is predicted counts with the sizes of GGUF."""
    return target if target in names_with_needs() else gguf.NAME


def needs_of_header(
    header: GgufHeader, *, context_length: int, quantization: str | None = None, engine: str = gguf.NAME
) -> Needs:
    """The needs of a base as its file is, or after quantization to `quantization`; UsageError for an unknown one."""
    types = None if quantization is None else quantization_named(quantization)
    needs = needs_of_sizes(header, _sizes(header, types, engine), context_length=context_length, engine=engine)
    if types is not None:
        width = number(header, "embedding_length")
        main_type, head_type = (row_type(name, width).name for name in (types.most, types.head))
        needs = replace(needs, main_type=main_type, head_type=head_type, layer_types=_layer_types(header, types))
    angles = _angle_bytes(header, engine)
    if _writes_head_twice(header, types, engine):
        needs = replace(needs, base_bytes=needs.base_bytes + needs.head_bytes, head_bytes=0)
    return replace(needs, base_bytes=needs.base_bytes + angles, angle_bytes=angles)


def _sizes(header: GgufHeader, types: Quantization | None, engine: str) -> dict[str, int]:
    """Bytes of each tensor in the engine's format; vectors are float32 in a quantized base and in ONNX."""
    sizes, keeps_types = {}, load_needs(engine).COST.has_tensor_types
    for name, tensor in header.tensors.items():
        if keeps_types and types is None:
            sizes[name] = tensor.nbytes
        elif len(tensor.shape) < 2:
            sizes[name] = math.prod(tensor.shape) * 4
        elif not keeps_types:
            sizes[name] = _onnx_bytes(tensor, header, types)
        else:
            assert types is not None
            sizes[name] = _quantized_bytes(tensor, header, types)
    return sizes


def _layer_types(header: GgufHeader, types: Quantization) -> tuple[str, ...]:
    """As `GgufHeader.layer_types`, after quantization."""
    return tuple(sorted({kind.name for tensor in header.layer_matrices for kind in _types_of(tensor, header, types)}))


def _angle_bytes(header: GgufHeader, engine: str) -> int:
    """Bytes of ONNX Runtime's tables of angles: a cosine and a sine of each pair, in float32, for each position."""
    if load_needs(engine).COST.has_tensor_types:
        return 0
    return number(header, "context_length") * 4 * sum(rotated_lengths(header))


def _writes_head_twice(header: GgufHeader, types: Quantization | None, engine: str) -> bool:
    """Whether the embedding is in the file a second time, as the output layer, because floats are transposed there."""
    head = header.tensors.get("token_embd.weight")
    if head is None or head.name != header.output_tensor or load_needs(engine).COST.has_tensor_types:
        return False
    return _onnx_bits(head, header, types) == _FLOAT_BITS


def _onnx_bytes(tensor: TensorInfo, header: GgufHeader, types: Quantization | None) -> int:
    """Bytes of the matrix in ONNX Runtime: 4 or 8 bits and a scale per block, or float32."""
    bits = _onnx_bits(tensor, header, types)
    return math.ceil(math.prod(tensor.shape) * (bits if bits == _FLOAT_BITS else bits + _ONNX_SCALE_BITS) / 8)


def _onnx_bits(tensor: TensorInfo, header: GgufHeader, types: Quantization | None) -> int:
    """Bits per weight of the matrix in ONNX Runtime, without scales."""
    kind = tensor.type
    if types is not None and tensor.name != _UNCHANGED:
        is_head = tensor.name in (header.output_tensor, PER_LAYER_EMBEDDING)
        kind = row_type(types.head if is_head else types.most, tensor.shape[0])
    return kind.onnx_bits or 8


def _quantized_bytes(tensor: TensorInfo, header: GgufHeader, types: Quantization) -> int:
    """Bytes of the matrix: the mean where it may get one of two types."""
    columns, kinds = tensor.shape[0], _types_of(tensor, header, types)
    row_bytes = sum(columns // kind.block * kind.block_bytes for kind in kinds)
    return math.prod(tensor.shape[1:]) * row_bytes // len(kinds)


def _types_of(tensor: TensorInfo, header: GgufHeader, types: Quantization) -> tuple[TensorType, ...]:
    """The types that the matrix may get."""
    if tensor.name == _UNCHANGED:
        return (tensor.type,)
    is_head = tensor.name in (header.output_tensor, PER_LAYER_EMBEDDING)
    names = (types.head,) if is_head else _body_types(tensor.name, header, types)
    return tuple(row_type(name, tensor.shape[0]) for name in names)


def _body_types(name: str, header: GgufHeader, types: Quantization) -> tuple[str, ...]:
    """The types that llama.cpp may give a matrix that is not the head, as in llama-quant.cpp without a matrix.

    Half of the down projections and of those with the values, which may have queries and keys too, get `types.some`,
    unless the quantization has other rules.
    """
    is_value = name.endswith(("attn_v.weight", "attn_qkv.weight"))
    is_down = name.endswith("ffn_down.weight")
    layers = number(header, "block_count")
    layer = int(name.split(".")[1]) if name.startswith("blk.") else layers
    if types.most == "q3_k":
        if (is_value and layer < 2) or (is_down and layer < layers // 16):
            return ("q5_k",)
        return (types.some,) if is_value or is_down or name.endswith("attn_output.weight") else (types.most,)
    if types.most in {"iq4_nl", "iq4_xs"}:
        has_few_values = number(header, "attention.head_count") >= 4 * number(header, "attention.head_count_kv")
        return ("q5_k",) if (is_value and has_few_values) or (is_down and layer < layers // 8) else (types.most,)
    return (types.most, types.some) if is_value or is_down else (types.most,)


def row_type(name: str, columns: int) -> TensorType:
    """The type in which llama.cpp stores rows of this length when they are to have the type `name`."""
    kind = TENSOR_TYPES[name]
    return row_type(kind.narrow or "f16", columns) if columns % kind.block else kind
