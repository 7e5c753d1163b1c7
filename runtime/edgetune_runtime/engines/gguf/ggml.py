"""ggml's own libraries: loads the CPU backend where it is a file of its own, names it, and ends its threads."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from edgetune_runtime.errors import IncompatibleError

_STATIC = "built-in"
"""The variant of a library with only one CPU backend, linked into it."""
_SOFT = 1
"""OpenMP's omp_pause_soft: the settings stay."""


class CpuBackend(NamedTuple):
    """The code that computes: the name of the variant, such as armv8.2_2, and the processor features that it uses."""

    variant: str
    features: tuple[str, ...]


class _Feature(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def open_library(llama_cpp: ModuleType, name: str) -> ctypes.CDLL:
    """The library `name`, such as ggml-base, that llama_cpp comes with; IncompatibleError if it is missing."""
    folder = library_folder(llama_cpp)
    names = {"darwin": (f"lib{name}.dylib",), "win32": (f"{name}.dll", f"lib{name}.dll")}
    candidates = [folder / file for file in names.get(sys.platform, (f"lib{name}.so",))]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise IncompatibleError(f"no library {name} in {folder}", "install llama-cpp-python again")
    return ctypes.CDLL(str(path))


def library_folder(llama_cpp: ModuleType) -> Path:
    """The folder that llama_cpp loads its libraries from."""
    return Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(str(llama_cpp.__file__)).parent / "lib")


def registry(llama_cpp: ModuleType) -> ctypes.CDLL:
    """The library through which the functions of llama.cpp's own backend registry are found."""
    # Wheels contain libggml under several names, and each name that is opened is a copy with a registry of its own.
    # Only Windows does not look for a function in the libraries that a library needs.
    return open_library(llama_cpp, "ggml" if sys.platform == "win32" else "llama")


def load_backends(llama_cpp: ModuleType) -> None:
    """Load the fastest CPU backend that this processor supports, if the libraries do not contain one already.

    IncompatibleError if none fits the processor.
    """
    ggml = registry(llama_cpp)
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_reg_count() > 0:
        return
    # llama.cpp itself would search the folder of the Python interpreter and the current folder.
    ggml.ggml_backend_load_all_from_path(ctypes.c_char_p(os.fsencode(library_folder(llama_cpp))))
    if ggml.ggml_backend_reg_count() == 0:
        message = f"none of the CPU backends in {library_folder(llama_cpp)} runs on this processor"
        raise IncompatibleError(message, "install a wheel for this processor: see `edgetune wheel --help`")


def cpu_backend(llama_cpp: ModuleType) -> CpuBackend:
    """The CPU backend that is loaded."""
    address = _features_function(llama_cpp)
    registered = ctypes.c_void_p(registry(llama_cpp).ggml_backend_reg_by_name(b"CPU"))
    features = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registered)
    # The list ends with a feature without a name; an array of C has no length.
    names = [feature.name.decode() for feature in takewhile(lambda feature: feature.name, features)]
    file = _file_at(address)
    variant = file.name.partition("ggml-cpu-")[2].removesuffix(".so") if file else ""
    return CpuBackend(variant or _STATIC, tuple(names))


def end_threads_function(llama_cpp: ModuleType) -> Callable[[], object]:
    """A function that ends the threads which GNU's OpenMP keeps for the calling thread, if the CPU backend has them.

    While more threads are kept than there are cores, for all callers together, OpenMP puts threads to sleep at each of
    the hundreds of barriers of a step (`gomp_throttled_spin_count_var` in libgomp's env.c).
    """
    file = _file_at(_features_function(llama_cpp))
    # Functions of the libraries that it needs are found through it.
    backend = ctypes.CDLL(str(file)) if file else None
    # LLVM's library of the same interface would end the threads of all callers.
    if backend is None or not hasattr(backend, "omp_pause_resource_all") or hasattr(backend, "__kmpc_fork_call"):
        return lambda: None
    end = partial(backend.omp_pause_resource_all, _SOFT)
    # A forked process would wait for its parent's threads.
    os.register_at_fork(before=end)
    return end


def _features_function(llama_cpp: ModuleType) -> int:
    """The address of the CPU backend's function that names its features."""
    ggml = registry(llama_cpp)
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    backend = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"CPU"))
    address: int = ggml.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_get_features")
    return address


def _file_at(address: int) -> Path | None:
    """The file that the code at `address` was loaded from; None where the system does not say."""
    symbol = _SymbolInfo()
    if sys.platform == "win32" or not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol)):
        return None
    return Path(os.fsdecode(symbol.file))
