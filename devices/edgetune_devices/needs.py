"""The needs of a base as its file is, or after quantization, from its header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from edgetune_runtime.engines import gguf, load_needs
from edgetune_runtime.engines.gguf.needs import needs_of_sizes
from edgetune_runtime.engines.needs import AdapterSize, Needs
from edgetune_runtime.formats.gguf_file import PER_LAYER_EMBEDDING, GgufHeader, TensorInfo
from edgetune_runtime.formats.gguf_sizes import data_start, number, rotated_lengths
from edgetune_runtime.formats.quantization import (
    TENSOR_TYPES,
    Quantization,
    TensorType,
    quantization_named,
    quantization_of_merged,
)

_UNCHANGED = "per_layer_model_proj.weight"
"""A matrix that llama.cpp does not quantize."""
# A scale in f32 for each block of 32 weights.
_ONNX_SCALE_BITS = 1


def needs_of_header(
    header: GgufHeader,
    *,
    context_length: int,
    quantization: str | None = None,
    adapters: Mapping[str, AdapterSize] | None = None,
    merged: Mapping[str, bool] | None = None,
    merged_quantization: str | None = None,
    engine: str = gguf.NAME,
) -> Needs:
    """The needs of a base as its file is, or after quantization to `quantization`.

    `merged` are the adapters that are full models, with whether they can be trained on the base's grid; they have the
    quantization of `quantization_of_merged`. UsageError for an unknown quantization.
    """
    chosen = None if quantization is None else quantization_named(quantization)
    main_type, head_type = header.main_type, ""
    if chosen is not None:
        width = number(header, "embedding_length")
        main_type, head_type = row_type(chosen.most, width), row_type(chosen.head, width).name
    sizes, merged_bytes, angles = _sizes(header, chosen, engine), {}, _angle_bytes(header, engine)
    for name, trains_on_grid in (merged or {}).items():
        other = quantization_of_merged(main_type, merged_quantization, trains_on_grid=trains_on_grid)
        own = sizes if other is None else _sizes(header, quantization_named(other), engine)
        merged_bytes[name] = data_start(header) + sum(own.values()) + angles
    needs = needs_of_sizes(
        header,
        sizes,
        context_length=context_length,
        engine=engine,
        main_type=main_type.name,
        head_type=head_type,
    )
    return replace(
        needs,
        base_bytes=needs.base_bytes + angles,
        angle_bytes=angles,
        adapters=dict(adapters or {}),
        merged=merged_bytes,
    )


def _sizes(header: GgufHeader, quantization: Quantization | None, engine: str) -> dict[str, int]:
    """Bytes of each tensor in the engine's format; vectors are float32 in a quantized base and in ONNX."""
    sizes, keeps_types = {}, load_needs(engine).COST.has_tensor_types
    for name, tensor in header.tensors.items():
        if keeps_types and quantization is None:
            sizes[name] = tensor.nbytes
        elif len(tensor.shape) < 2:
            sizes[name] = math.prod(tensor.shape) * 4
        elif not keeps_types:
            sizes[name] = _onnx_bytes(tensor, header, quantization)
        else:
            assert quantization is not None
            sizes[name] = _quantized_bytes(tensor, header, quantization)
    return sizes


def _angle_bytes(header: GgufHeader, engine: str) -> int:
    """Bytes of ONNX Runtime's tables of angles: a cosine and a sine of each pair, in float32, for each position."""
    if load_needs(engine).COST.has_tensor_types:
        return 0
    return number(header, "context_length") * 4 * sum(rotated_lengths(header))


def _onnx_bytes(tensor: TensorInfo, header: GgufHeader, quantization: Quantization | None) -> int:
    """Bytes of the matrix in ONNX Runtime: 4 or 8 bits and a scale per block, or float32."""
    kind = tensor.type
    if quantization is not None and tensor.name != _UNCHANGED:
        is_head = tensor.name in (header.output_tensor, PER_LAYER_EMBEDDING)
        kind = row_type(quantization.head if is_head else quantization.most, tensor.shape[0])
    bits = kind.onnx_bits or 8
    return math.ceil(math.prod(tensor.shape) * (bits if bits == 32 else bits + _ONNX_SCALE_BITS) / 8)


def _quantized_bytes(tensor: TensorInfo, header: GgufHeader, quantization: Quantization) -> int:
    """Bytes of the matrix; half of the value and down projections get another type, so each counts with the mean."""
    columns = tensor.shape[0]
    rows = math.prod(tensor.shape[1:])
    if tensor.name == _UNCHANGED:
        return tensor.nbytes
    if tensor.name in (header.output_tensor, PER_LAYER_EMBEDDING):
        return rows * _row_bytes(quantization.head, columns)
    if tensor.name.endswith(("attn_v.weight", "ffn_down.weight")):
        return rows * (_row_bytes(quantization.most, columns) + _row_bytes(quantization.some, columns)) // 2
    return rows * _row_bytes(quantization.most, columns)


def _row_bytes(type_name: str, columns: int) -> int:
    kind = row_type(type_name, columns)
    return columns // kind.block * kind.block_bytes


def row_type(type_name: str, columns: int) -> TensorType:
    """The type that llama.cpp stores rows of this length in."""
    kind = TENSOR_TYPES[type_name]
    return row_type(kind.narrow or "f16", columns) if columns % kind.block else kind
