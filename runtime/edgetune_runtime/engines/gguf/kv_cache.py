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
from .needs import BRANCHES

MAIN = 0
"""The main sequence; the others are branches of it."""
_WHOLE = 0
"""LLAMA_STATE_SEQ_FLAGS_NONE."""


class KvCache:
    """The KV cache of `context`, a context of `model`, with which it is freed; `cells` is its size in tokens.

    `branches` is how many branches the sequence can have at a time; for `max_rollback` see `Engine`.
    """

    branches = BRANCHES
    max_rollback: int | None = None

    def __init__(self, context: Any, model: Any) -> None:  # noqa: ANN401 - bare pointers
        llama = library()
        self._context = context
        self._memory = llama.llama_get_memory(context)
        self._window: int = llama.llama_model_n_swa(model)
        self.cells: int = llama.llama_n_ctx(context)

    def begin_step(self, length: int, tokens: int) -> None:
        """Prepare for a step of that many tokens after `length` ones."""

    def undo_step(self, length: int) -> None:
        """Undo a step after `length` tokens that failed or was stopped."""
        self.drop(length)

    def keep(self, length: int) -> None:
        """Make it possible to truncate the main sequence, which has `length` tokens, to this length later."""

    def truncate(self, end: int) -> int:
        """Drop the main sequence from position `end` on; its length afterwards, which may be less.

        That is `end` if its sliding-window layers have what comes before, else 0, and nothing is dropped.
        """
        # For sliding-window layers, a saved state contains only the last window. If it were truncated to an earlier
        # position, those layers would silently attend to fewer tokens than the model was trained on.
        first: int = library().llama_memory_seq_pos_min(self._memory, MAIN)
        return end if first <= max(0, end - self._window + 1) and self.drop(end) else 0

    def drop(self, start: int) -> bool:
        """Drop the main sequence from position `start` on; False if llama.cpp refuses."""
        return bool(library().llama_memory_seq_rm(self._memory, MAIN, start, -1))

    def save(self) -> memoryview:
        """The state of the main sequence."""
        return self._save(_WHOLE)

    def restore(self, state: bytes | memoryview) -> int:
        """Replace the main sequence by a saved one; its length.

        VerificationError when llama.cpp refuses the state; the sequence is empty then.
        """
        self.drop(0)
        if not self._restore(state, _WHOLE):
            self.drop(0)
            raise VerificationError(f"llama.cpp refused a saved state: {last_errors()}", "start without it")
        length: int = library().llama_memory_seq_pos_max(self._memory, MAIN) + 1
        return length

    def _save(self, part: int) -> memoryview:
        llama = library()
        size: int = llama.llama_state_seq_get_size_ext(self._context, MAIN, part)
        buffer = np.empty(size, np.uint8)
        if llama.llama_state_seq_get_data_ext(self._context, _pointer(buffer), size, MAIN, part) != size:
            raise EdgetuneError(f"llama.cpp cannot save a state of {size} bytes: {last_errors()}")
        return buffer.data

    def _restore(self, state: bytes | memoryview, part: int) -> bool:
        last_errors()
        pointer = _pointer(np.frombuffer(state, np.uint8))
        return bool(library().llama_state_seq_set_data_ext(self._context, pointer, len(state), MAIN, part))

    @contextmanager
    def branched(self, count: int) -> Iterator[None]:
        """While the block runs, sequences 1 to `count` share all cells of the main sequence."""
        llama = library()
        try:
            for branch in range(MAIN + 1, MAIN + 1 + count):
                llama.llama_memory_seq_cp(self._memory, MAIN, branch, -1, -1)
            yield
        finally:
            # One call, so that Ctrl-C leaves no branch.
            llama.llama_memory_seq_keep(self._memory, MAIN)


def _pointer(buffer: NDArray[np.uint8]) -> Any:  # noqa: ANN401 - a bare pointer
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
