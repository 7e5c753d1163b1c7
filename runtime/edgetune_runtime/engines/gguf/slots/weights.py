"""Gives a model from memory the weights of a GGUF file: mapped, or rearranged for the processor as llama.cpp does."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .native import Tensor, ggml, repacking_buffer_for, weight_buffer

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
Bytes = NDArray[np.uint8]


class BaseWeights:
    """The weights of the base at `path` in the tensors of a model; `close` frees them after the model.

    With `repack`, matrices are rearranged in memory where the processor multiplies them faster so. All other weights
    are those of the mapped file, which processes share, except for q, k and v, which the model has as one matrix.
    `embedding` has the bytes of each token's row; a row that is written is private to this model.
    """

    def __init__(self, path: Path, header: GgufHeader, tensors: Mapping[str, Tensor], repack: bool) -> None:
        self._header = header
        with path.open("rb") as file:
            # A mapping that is too short would end the process at the first step.
            if os.fstat(file.fileno()).st_size < max(part.offset + part.nbytes for part in header.tensors.values()):
                raise VerificationError(f"{path} was changed while it was opened", COPY_FILE_AGAIN)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._private_map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        private: Bytes = np.frombuffer(self._private_map, np.uint8)
        rows = header.tensors[EMBEDDING]
        self.embedding = private[rows.offset : rows.offset + rows.nbytes].reshape(rows.shape[1], -1)
        # The output matrix can be the embedding, and must not change with its rows.
        self._buffers = {name: self._mapped(view) for name, view in ((EMBEDDING, private), ("", self._bytes))}
        self._place(tensors, repack)

    def close(self) -> None:
        """Free the weights, which no model may use any more."""
        for buffer in self._buffers.values():
            ggml().ggml_backend_buffer_free(buffer)
        self._buffers.clear()

    def _mapped(self, view: Bytes) -> int:
        buffer: int = ggml().ggml_backend_cpu_buffer_from_ptr(view.ctypes.data, view.nbytes)
        return buffer

    def _place(self, tensors: Mapping[str, Tensor], repack: bool) -> None:
        repacked: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            is_matrix = tensor.ne[1] > 1 and name != EMBEDDING
            kind = repacking_buffer_for(tensor.type, tensor.ne[0], tensor.ne[1]) if repack and is_matrix else None
            if kind is not None:
                repacked.setdefault(kind, {})[name] = tensor
            elif name in self._header.tensors or name == OUTPUT:
                buffer = self._buffers[EMBEDDING if name == EMBEDDING else ""]
                start: int = ggml().ggml_backend_buffer_get_base(buffer)
                _move(tensor, buffer, start + self._sources(name)[0].offset)
            else:
                self._fill(name, tensor)
        for kind, members in repacked.items():
            self._repack(kind, members)
        advice = "MADV_DONTNEED" if repacked else "MADV_WILLNEED"
        if hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice))

    def _repack(self, kind: int, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into one buffer of this kind, which rearranges them."""
        alignment: int = ggml().ggml_backend_buft_get_alignment(kind)
        sizes = [ggml().ggml_backend_buft_get_alloc_size(kind, ctypes.byref(tensor)) for tensor in tensors.values()]
        steps = [size + -size % alignment for size in sizes]
        buffer = self._buffers[f"repacked {kind}"] = weight_buffer(kind, sum(steps))
        start: int = ggml().ggml_backend_buffer_get_base(buffer)
        for (name, tensor), step in zip(tensors.items(), steps, strict=True):
            _move(tensor, buffer, start)
            self._fill(name, tensor)
            start += step

    def _fill(self, name: str, tensor: Tensor) -> None:
        """Copy the values of a tensor to where it is."""
        parts = [self._bytes[part.offset : part.offset + part.nbytes] for part in self._sources(name)]
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        ggml().ggml_backend_tensor_set(ctypes.byref(tensor), values.ctypes.data, 0, values.nbytes)

    def _sources(self, name: str) -> list[TensorInfo]:
        """The tensors of the file that have the values of the model's tensor `name`."""
        tensors = self._header.tensors
        if name in tensors:
            return [tensors[name]]
        if name == OUTPUT:
            return [tensors[EMBEDDING]]
        return [tensors[name.replace("attn_qkv", f"attn_{which}")] for which in "qkv"]


def _move(tensor: Tensor, buffer: int, address: int) -> None:
    """Let a tensor have its values at an address in a buffer."""
    tensor.buffer = tensor.data = None
    ggml().ggml_backend_tensor_alloc(buffer, ctypes.byref(tensor), address)
