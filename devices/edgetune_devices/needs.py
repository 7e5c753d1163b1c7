"""The needs of a base after quantization, from a header or from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgetune_runtime.engines import gguf, onnx
from edgetune_runtime.engines.gguf.needs import needs_of_sizes
from edgetune_runtime.engines.needs import AdapterSize, Needs
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo
from edgetune_runtime.formats.gguf_sizes import data_start, number
from edgetune_runtime.formats.quantization import (
    TENSOR_TYPES,
    Quantization,
    TensorType,
    quantization_named,
    quantization_of_merged,
)

_HEAD_WIDTH = 64
# A scale in f32 for each block of 32 weights.
_ONNX_SCALE_BITS = 1


def needs_of_header(
    header: GgufHeader,
    *,
    context_length: int,
    quantization: str | None = None,
    adapters: Mapping[str, AdapterSize] | None = None,
    merged: Sequence[str] = (),
    merged_quantization: str | None = None,
    engine: str = gguf.NAME,
) -> Needs:
    """The needs of a base as its file is, or after quantization to `quantization`.

    `merged` names the adapters that are full models, which have the quantization of `quantization_of_merged`.
    UsageError for an unknown quantization.
    """
    chosen = None if quantization is None else quantization_named(quantization)
    width = number(header, "embedding_length")
    main_type = header.main_type if chosen is None else _row_type(chosen.most, width)
    sizes = _sizes(header, chosen, engine)
    needs = needs_of_sizes(
        header,
        sizes,
        context_length=context_length,
        engine=engine,
        main_type=main_type.name,
        head_type="" if chosen is None else _row_type(chosen.head, width).name,
    )
    finer = quantization_of_merged(main_type, merged_quantization)
    merged_bytes = needs.base_bytes
    if finer is not None:
        merged_bytes = data_start(header) + sum(_sizes(header, quantization_named(finer), engine).values())
    return replace(needs, adapters=dict(adapters or {}), merged=dict.fromkeys(merged, merged_bytes))


def estimate_needs(
    *,
    parameters: int,
    bits_per_weight: float,
    layers: int,
    kv_values_per_token: int,
    context_length: int,
    adapter_bytes: int = 0,
    adapter_modules: int = 0,
    vocabulary: int = 49152,
) -> Needs:
    """The needs of a base without a header; widths are guessed from the numbers of parameters and layers.

    Assumes that the embedding is tied to the output head.
    """
    # A transformer layer of width w has about 12 w^2 parameters if its feed-forward part is 3 w wide.
    width = math.isqrt(parameters // (12 * layers))
    size = math.ceil(parameters * bits_per_weight / 8)
    return Needs(
        base_bytes=size,
        read_bytes=size,
        read_parameters=parameters,
        head_parameters=vocabulary * width,
        layers=layers,
        heads=math.ceil(width / _HEAD_WIDTH),
        embedding_length=width,
        feed_forward_length=3 * width,
        vocabulary=vocabulary,
        kv_values_per_token=kv_values_per_token,
        context_length=context_length,
        engine=gguf.NAME,
        adapters={"adapters": AdapterSize(adapter_bytes, adapter_modules)} if adapter_bytes else {},
    )


def _sizes(header: GgufHeader, quantization: Quantization | None, engine: str) -> dict[str, int]:
    """Bytes of each tensor in the engine's format."""
    if engine == onnx.NAME:
        return {name: _onnx_bytes(tensor, header, quantization) for name, tensor in header.tensors.items()}
    return {name: _tensor_bytes(tensor, header, quantization) for name, tensor in header.tensors.items()}


def _onnx_bytes(tensor: TensorInfo, header: GgufHeader, quantization: Quantization | None) -> int:
    """Bytes of the tensor in ONNX Runtime: 4 or 8 bits and a scale per block, or float32."""
    count = math.prod(tensor.shape)
    if len(tensor.shape) < 2:
        return count * 4
    kind = tensor.type
    if quantization is not None:
        head = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
        kind = TENSOR_TYPES[quantization.head if tensor.name == head else quantization.most]
        if tensor.shape[0] % kind.block:
            kind = TENSOR_TYPES[kind.narrow or "f16"]
    bits = kind.onnx_bits or 8
    return math.ceil(count * (bits if bits == 32 else bits + _ONNX_SCALE_BITS) / 8)


def _tensor_bytes(tensor: TensorInfo, header: GgufHeader, quantization: Quantization | None) -> int:
    """Bytes of the tensor; half of the value and down projections get another type, so each counts with the mean."""
    if quantization is None:
        return tensor.nbytes
    if len(tensor.shape) < 2:
        return math.prod(tensor.shape) * 4
    columns = tensor.shape[0]
    rows = math.prod(tensor.shape[1:])
    head_name = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    if tensor.name == head_name:
        return rows * _row_bytes(quantization.head, columns)
    if tensor.name.endswith(("attn_v.weight", "ffn_down.weight")):
        return rows * (_row_bytes(quantization.most, columns) + _row_bytes(quantization.some, columns)) // 2
    return rows * _row_bytes(quantization.most, columns)


def _row_bytes(type_name: str, columns: int) -> int:
    kind = _row_type(type_name, columns)
    return columns // kind.block * kind.block_bytes


def _row_type(type_name: str, columns: int) -> TensorType:
    """The type that llama.cpp stores rows of this length in."""
    kind = TENSOR_TYPES[type_name]
    return _row_type(kind.narrow or "f16", columns) if columns % kind.block else kind
