"""Unquantized GGUF and a scheme in, quantized GGUF out; also rows of floats in, the bytes of a ggml type out."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, OutOfSpaceError, UsageError, VerificationError
from edgetune_runtime.gguf_file import GGML_TYPES, GgufHeader, read_header

from .atomic import replacing
from .fold import Floats

# Scheme to llama.cpp's file type. A scheme that needs an importance matrix is not among them.
SCHEMES: dict[str, int] = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q5_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_S,
    "q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "iq4_nl": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "q3_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
}
_UNQUANTIZED = ("f32", "f16", "bf16")
_LOG_LEVEL_ERROR = 3


def quantize_gguf(source: Path, out: Path, scheme: str) -> None:
    """Quantize the f32, f16 or bf16 file `source` to `scheme` with llama.cpp, into `out`, whole or not at all.

    Tensors whose columns a scheme cannot divide fall back to another type, as llama.cpp decides;
    `describe_quantization` tells what came out. Raises UsageError for an unknown scheme, IncompatibleError when
    `source` is already quantized, OutOfSpaceError, VerificationError when llama.cpp refuses the file.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"no quantization {scheme!r}", f"choose one of: {', '.join(SCHEMES)}")
    held = describe_quantization(read_header(source))
    if held not in _UNQUANTIZED:
        remedy = "give the unquantized model, or ship this file as it is"
        raise IncompatibleError(f"{source} is already quantized to {held}", remedy)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = SCHEMES[scheme]
    with replacing(out) as temporary, _captured_log() as log:
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), parameters)
        if status != 0:
            raise _failure(source, out, " ".join("".join(log).split()))


def quantize_rows(values: Floats, ggml_type: int) -> bytes:
    """The bytes of `values` [rows, columns] as a tensor of this ggml type, made by ggml itself.

    Raises IncompatibleError for a type that needs an importance matrix or whose blocks do not divide the columns.
    """
    name, block_size, block_bytes = GGML_TYPES[ggml_type]
    rows, columns = values.shape
    library = _ggml()
    if columns % block_size or library.ggml_quantize_requires_imatrix(ggml_type):
        raise IncompatibleError(f"cannot write rows of {columns} values as {name}", "quantize the base to q8_0")
    contiguous = np.ascontiguousarray(values, np.float32)
    out = ctypes.create_string_buffer(rows * columns // block_size * block_bytes)
    source = contiguous.ctypes.data_as(ctypes.c_void_p)
    written = library.ggml_quantize_chunk(ggml_type, source, out, 0, rows, columns, None)
    if written != len(out):
        raise EdgetuneError(f"ggml wrote {written} bytes of {name}, expected {len(out)}", "report this as a bug")
    return out.raw


def describe_quantization(header: GgufHeader) -> str:
    """The tensor type that takes the most bytes of the file, for example "q4_1"."""
    bytes_by_type: Counter[str] = Counter()
    for tensor in header.tensors.values():
        bytes_by_type[tensor.type_name] += tensor.nbytes
    return bytes_by_type.most_common(1)[0][0]


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collect llama.cpp's errors and print nothing, then put the former log callback back."""
    lines: list[str] = []

    def collect(level: int, text: bytes, _: object) -> None:
        if level == _LOG_LEVEL_ERROR:
            lines.append(text.decode("utf-8", "replace"))

    callback, former, data = llama_cpp.llama_log_callback(collect), llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(data))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(former, data)


def _failure(source: Path, out: Path, reason: str) -> EdgetuneError:
    # The C++ stream does not tell why a write failed; a disk that was filled up to the last block does.
    if shutil.disk_usage(out.parent).free < 1 << 20:
        return OutOfSpaceError(f"no space left to write {out}", "free some space or choose another folder")
    message = f"llama.cpp cannot quantize {source}: {reason or 'it gives no reason'}"
    return VerificationError(message, "convert the model again")


@cache
def _ggml() -> ctypes.CDLL:
    """The ggml library beside llama_cpp's, with the types of the functions used here."""
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
    names = {"darwin": ("libggml-base.dylib",), "win32": ("ggml-base.dll", "libggml-base.dll")}
    candidates = [folder / name for name in names.get(sys.platform, ("libggml-base.so",))]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise IncompatibleError(f"no ggml library in {folder}", "install llama-cpp-python again")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
