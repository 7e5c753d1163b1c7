"""Functions of ggml that llama_cpp does not export: metadata of GGUF files, buffers and tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.gguf.ggml import registry
from edgetune_runtime.engines.gguf.llama import library
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN

UINT32, INT32, FLOAT32, BOOL, STRING = 4, 5, 6, 7, 8
"""Types of values in GGUF files."""
_WEIGHTS = 1
"""GGML_BACKEND_BUFFER_USAGE_WEIGHTS"""


class Tensor(ctypes.Structure):
    """`ggml_tensor`, of which the library gives the address."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class _GgufParameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class _ContextParameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _TEXT, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
_TENSOR = ctypes.POINTER(Tensor)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "gguf_init_from_file": (_POINTER, _TEXT, _GgufParameters),
    "gguf_free": (None, _POINTER),
    "gguf_set_val_u32": (None, _POINTER, _TEXT, ctypes.c_uint32),
    "gguf_set_val_f32": (None, _POINTER, _TEXT, ctypes.c_float),
    "gguf_set_val_bool": (None, _POINTER, _TEXT, ctypes.c_bool),
    "gguf_set_val_str": (None, _POINTER, _TEXT, _TEXT),
    "gguf_set_arr_data": (None, _POINTER, _TEXT, ctypes.c_int, _POINTER, _SIZE),
    "gguf_add_tensor": (None, _POINTER, _TENSOR),
    "ggml_init": (_POINTER, _ContextParameters),
    "ggml_free": (None, _POINTER),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_new_tensor_2d": (_TENSOR, _POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "ggml_mul_mat": (_TENSOR, _POINTER, _TENSOR, _TENSOR),
    "ggml_backend_reg_by_name": (_POINTER, _TEXT),
    "ggml_backend_reg_dev_get": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, _TEXT),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _POINTER, _TENSOR),
    "ggml_backend_buft_alloc_buffer": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_buft_get_alignment": (_SIZE, _POINTER),
    "ggml_backend_buft_get_alloc_size": (_SIZE, _POINTER, _TENSOR),
    "ggml_backend_buffer_get_base": (_POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_buffer_set_usage": (None, _POINTER, ctypes.c_int),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_tensor_alloc": (ctypes.c_int, _POINTER, _TENSOR, _POINTER),
    "ggml_backend_tensor_set": (None, _TENSOR, _POINTER, _SIZE, _SIZE),
}
"""The result and the arguments of each function."""


@cache
def ggml() -> Any:  # noqa: ANN401 - a library of ctypes functions
    """The libraries of ggml beside llama_cpp, with the functions above."""
    functions = registry(library())
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions


class Metadata:
    """The metadata of the GGUF file at `path`, to be changed in memory; `close` frees it.

    VerificationError when ggml cannot read them.
    """

    def __init__(self, path: Path) -> None:
        self.pointer = ggml().gguf_init_from_file(os.fsencode(path), _GgufParameters(no_alloc=True))
        if not self.pointer:
            raise VerificationError(f"llama.cpp cannot read {path}", COPY_FILE_AGAIN)

    def set(self, key: str, kind: int, value: Any) -> None:  # noqa: ANN401 - of the type `kind`
        """Set a value of the type `kind`, one of those above; an INT32 is an array."""
        functions, name = ggml(), key.encode()
        if kind == INT32:
            array = (ctypes.c_int32 * len(value))(*value)
            functions.gguf_set_arr_data(self.pointer, name, kind, array, len(value))
        elif kind == STRING:
            functions.gguf_set_val_str(self.pointer, name, value.encode("utf-8", "surrogateescape"))
        else:
            setters: dict[int, Callable[..., None]] = {
                UINT32: functions.gguf_set_val_u32,
                FLOAT32: functions.gguf_set_val_f32,
                BOOL: functions.gguf_set_val_bool,
            }
            setters[kind](self.pointer, name, value)

    def add_tensor(self, name: str, kind: int) -> None:
        """Say that the tensor `name` has the type `kind`; llama.cpp computes its shape itself."""
        with matrix_product(kind, 256, 1) as (weight, _):
            weight.contents.name = name.encode()
            ggml().gguf_add_tensor(self.pointer, weight)

    def close(self) -> None:
        """Free it."""
        ggml().gguf_free(self.pointer)


@contextmanager
def matrix_product(kind: int, columns: int, rows: int) -> Iterator[tuple[Any, Any]]:
    """Pointers to a matrix without data and to the operation that multiplies it, for the time of the block."""
    functions = ggml()
    size = 4 * functions.ggml_tensor_overhead()
    context = functions.ggml_init(_ContextParameters(size=size, no_alloc=True))
    try:
        weight = functions.ggml_new_tensor_2d(context, kind, columns, rows)
        activations = functions.ggml_new_tensor_2d(context, 0, columns, 512)
        yield weight, functions.ggml_mul_mat(context, weight, activations)
    finally:
        functions.ggml_free(context)


def weight_buffer(kind: int, size: int) -> int:
    """A new buffer of the type at the address `kind` for `size` bytes of weights."""
    buffer: int = ggml().ggml_backend_buft_alloc_buffer(kind, size)
    if not buffer:
        raise MemoryError(f"no memory for {size} bytes of weights")
    ggml().ggml_backend_buffer_set_usage(buffer, _WEIGHTS)
    return buffer


@cache
def repacking_buffers() -> tuple[int, ...]:
    """The addresses of the types of buffers whose weights are rearranged for this processor, the preferred first."""
    functions = ggml()
    cpu = functions.ggml_backend_reg_by_name(b"CPU")
    address = functions.ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return ()
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(_device())
    found: list[int] = []
    # The list ends with NULL.
    while kinds and kinds[len(found)]:
        found.append(kinds[len(found)])
    return tuple(found)


@cache
def repacking_buffer_for(kind: int, columns: int, rows: int) -> int | None:
    """The first of them that multiplies matrices of this type and shape: what llama.cpp itself would choose."""
    functions = ggml()
    for candidate in repacking_buffers():
        with matrix_product(kind, columns, rows) as (weight, product):
            # llama.cpp too asks with an empty buffer.
            weight.contents.buffer = functions.ggml_backend_buft_alloc_buffer(candidate, 0)
            try:
                if functions.ggml_backend_dev_supports_op(_device(), product):
                    return candidate
            finally:
                functions.ggml_backend_buffer_free(weight.contents.buffer)
    return None


@cache
def _device() -> int:
    """The processor, as ggml's device."""
    functions = ggml()
    device: int = functions.ggml_backend_reg_dev_get(functions.ggml_backend_reg_by_name(b"CPU"), 0)
    return device
