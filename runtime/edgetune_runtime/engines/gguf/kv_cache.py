"""The KV cache of a llama.cpp context: its main sequence, saved states of it, and branches that share its cells."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import EdgetuneError, VerificationError

from .llama import last_errors, library

MAIN = 0
"""The main sequence; the others are branches of it."""


class KvCache:
    """The KV cache of `context`, a context of `model`, with which it is freed; `cells` is its size in tokens."""

    def __init__(self, context: Any, model: Any) -> None:  # noqa: ANN401 - bare pointers
        llama = library()
        self._context = context
        self._memory = llama.llama_get_memory(context)
        self._window: int = llama.llama_model_n_swa(model)
        self.cells: int = llama.llama_n_ctx(context)

    def truncate(self, end: int) -> bool:
        """Drop the main sequence from position `end` on, if its sliding-window layers have what comes before."""
        # For sliding-window layers, a saved state contains only the last window. If it were truncated to an earlier
        # position, those layers would silently attend to fewer tokens than the model was trained on.
        first: int = library().llama_memory_seq_pos_min(self._memory, MAIN)
        return first <= max(0, end - self._window + 1) and self.drop(end)

    def drop(self, start: int) -> bool:
        """Drop the main sequence from position `start` on; False if llama.cpp refuses."""
        return bool(library().llama_memory_seq_rm(self._memory, MAIN, start, -1))

    def save(self) -> memoryview:
        """The keys and values of the main sequence."""
        llama = library()
        size: int = llama.llama_state_seq_get_size(self._context, MAIN)
        buffer = np.empty(size, np.uint8)
        if llama.llama_state_seq_get_data(self._context, _pointer(buffer), size, MAIN) != size:
            raise EdgetuneError(f"llama.cpp cannot save a state of {size} bytes: {last_errors()}")
        return buffer.data

    def restore(self, state: bytes | memoryview) -> int:
        """Replace the main sequence by a saved one; its length.

        VerificationError when llama.cpp refuses the state; the sequence is empty then.
        """
        self.drop(0)
        last_errors()
        pointer = _pointer(np.frombuffer(state, np.uint8))
        if not library().llama_state_seq_set_data(self._context, pointer, len(state), MAIN):
            self.drop(0)
            raise VerificationError(f"llama.cpp refused a saved state: {last_errors()}", "start without it")
        length: int = library().llama_memory_seq_pos_max(self._memory, MAIN) + 1
        return length

    @contextmanager
    def branched(self, count: int) -> Iterator[None]:
        """While the block runs, sequences 1 to `count` share all cells of the main sequence."""
        llama = library()
        branches = range(MAIN + 1, MAIN + 1 + count)
        for branch in branches:
            llama.llama_memory_seq_cp(self._memory, MAIN, branch, -1, -1)
        try:
            yield
        finally:
            for branch in branches:
                llama.llama_memory_seq_rm(self._memory, branch, -1, -1)


def _pointer(buffer: NDArray[np.uint8]) -> Any:  # noqa: ANN401 - a bare pointer
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
