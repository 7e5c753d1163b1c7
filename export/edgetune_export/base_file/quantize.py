"""Quantizes GGUF files with llama.cpp, and rows of floats with ggml; also dequantizes rows."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from edgetune_runtime.engines.gguf.ggml import open_library
from edgetune_runtime.engines.gguf.llama import last_errors, library
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, OutOfSpaceError, VerificationError
from edgetune_runtime.formats.atomic import is_full, replacing
from edgetune_runtime.formats.gguf_file import TensorInfo, read_header
from edgetune_runtime.formats.quantization import TENSOR_TYPES, TYPES_BY_NUMBER, quantization_named

from edgetune_export.adapters.shapes import Floats

from .importance import Importance

# ggml's functions that convert float types to f32; those for quantized types are named after the type.
_FLOAT_ROWS = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}


def quantize_gguf(
    source: Path, out: Path, quantization: str, *, again: bool = False, importance: Importance | None = None
) -> None:
    """Quantize the f32, f16 or bf16 file `source` to `quantization` with llama.cpp; `out` appears complete or not.

    With `again`, `source` may already be quantized; the rounding errors of both add up. With `importance`, the error of
    a column counts as much as its inputs are large; tensors without an entry are quantized as without. llama.cpp uses
    another type for tensors whose columns the block size does not divide. Raises UsageError for an unknown
    quantization, IncompatibleError if `source` is already quantized, VerificationError if llama.cpp refuses the file,
    OutOfSpaceError if the disk is full.
    """
    chosen = quantization_named(quantization)
    header = read_header(source)
    main_type = header.main_type
    if not main_type.is_float and not again:
        remedy = "give the unquantized model, or ship this file as it is"
        raise IncompatibleError(f"{source} is already quantized to {main_type.name}", remedy)
    llama = library()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = chosen.ftype
    parameters.allow_requantize = again
    types = {}
    if chosen.has_own_head:
        types[f"^{re.escape(header.output_tensor)}$"] = chosen.head
    if importance is not None:
        parameters.imatrix = _entries(importance, llama)
        if chosen.most == chosen.some:
            # With a matrix llama.cpp stores the first ones of q4_0 as q4_1, which ONNX requantizes to 8 bits.
            types["ffn_down"] = chosen.most
    parameters.tt_overrides = _overrides(types, llama)
    last_errors()
    with replacing(out) as temporary:
        if llama.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), parameters) != 0:
            raise _failure(source, out, last_errors())


def quantize_rows(values: Floats, ggml_type: int) -> bytes:
    """The bytes of `values` [rows, columns] as a tensor of this ggml type, computed by ggml.

    Raises IncompatibleError for a type that needs an importance matrix or whose block size does not divide the columns.
    """
    kind = TYPES_BY_NUMBER[ggml_type]
    rows, columns = values.shape
    ggml = _ggml()
    if columns % kind.block or ggml.ggml_quantize_requires_imatrix(ggml_type):
        raise IncompatibleError(f"cannot write rows of {columns} values as {kind.name}", "quantize the base to q8_0")
    contiguous = np.ascontiguousarray(values, np.float32)
    out = ctypes.create_string_buffer(rows * columns // kind.block * kind.block_bytes)
    source = contiguous.ctypes.data_as(ctypes.c_void_p)
    written = ggml.ggml_quantize_chunk(ggml_type, source, out, 0, rows, columns, None)
    if written != len(out):
        raise EdgetuneError(f"ggml wrote {written} bytes of {kind.name}, expected {len(out)}", "report this as a bug")
    return out.raw


def dequantize_rows(data: bytes | npt.NDArray[np.uint8], tensor: TensorInfo, out: Floats | None = None) -> Floats:
    """The values of a tensor whose bytes are `data`, float32 [rows, columns], computed by ggml.

    They are written to `out` if given, which must be contiguous. Raises IncompatibleError for an unknown type,
    VerificationError if `data` does not have the tensor's size.
    """
    values = np.empty(tensor.shape[::-1], np.float32) if out is None else out
    raw = np.frombuffer(data, np.uint8)
    if raw.size != tensor.nbytes:
        message = f"{tensor.name} has {raw.size} bytes of {tensor.nbytes}"
        raise VerificationError(message, "build or copy the base again")
    if tensor.type.name == "f32":
        values[...] = raw.view("<f4").reshape(values.shape)
        return values
    name = _FLOAT_ROWS.get(tensor.type.name) or f"dequantize_row_{tensor.type.name.replace('_k', '_K')}"
    convert = getattr(_ggml(), name, None)
    if convert is None:
        message = f"cannot read the weights of {tensor.name}, which are of type {tensor.type.name}"
        raise IncompatibleError(message, "quantize the base to q8_0")
    convert.argtypes, convert.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    convert(raw.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), values.size)
    return values


def _entries(importance: Importance, llama: Any) -> Any:  # noqa: ANN401 - ctypes
    """The matrix as llama.cpp takes it: an array that ends with an empty entry."""
    entries = (llama.llama_model_imatrix_data * (len(importance.mean_squares) + 1))()
    for entry, (name, values) in zip(entries, importance.mean_squares.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        # An array of ctypes, which lives as long as the entries.
        entry.data = (ctypes.c_float * values.size).from_buffer_copy(values.astype(np.float32).tobytes())
    return entries


def _overrides(types: Mapping[str, str], llama: Any) -> Any:  # noqa: ANN401 - ctypes
    """Types by patterns of tensors' names, as llama.cpp takes them: an array that ends with an empty entry."""
    overrides = (llama.llama_model_tensor_override * (len(types) + 1))()
    for override, (pattern, name) in zip(overrides, types.items(), strict=False):
        override.pattern, override.type = pattern.encode(), TENSOR_TYPES[name].number
    return overrides


def _failure(source: Path, out: Path, reason: str) -> EdgetuneError:
    # llama.cpp does not report why a write failed, so check whether the disk is full.
    if is_full(out.parent):
        return OutOfSpaceError(f"no space left to write {out}", "free some space or choose another folder")
    message = f"llama.cpp cannot quantize {source}: {reason}"
    return VerificationError(message, "convert the model again")


@cache
def _ggml() -> ctypes.CDLL:
    """The ggml library in the folder of llama_cpp's, with the types of the functions used here."""
    ggml = open_library(library(), "ggml-base")
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    return ggml
