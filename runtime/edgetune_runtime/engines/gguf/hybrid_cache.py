"""The cache of a model with recurrent layers, whose state cannot be rolled back by position as keys and values can.

llama.cpp drops up to ROLLBACK tokens (sizes.py) from the end of the last step only. Every other cut needs a checkpoint
of the recurrent state at its position: there is one at the end of each part of a prompt, of each restored state, and
before the last step. The engine cuts to the last checkpoint before any other position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgetune_runtime.errors import EdgetuneError

from .kv_cache import KvCache
from .llama import last_errors, library
from .sizes import BRANCHES, HYBRID_BRANCHES, most_checkpoints, rollback_of

_RECURRENT = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY."""


class HybridCache(KvCache):
    """As `KvCache`, with checkpoints; `state_bytes` is the size of the recurrent state of a sequence."""

    branches = HYBRID_BRANCHES

    def __init__(self, context: Any, model: Any, state_bytes: int) -> None:  # noqa: ANN401 - bare pointers
        super().__init__(context, model)
        self.max_rollback = rollback_of(state_bytes)
        self._most = most_checkpoints(state_bytes)
        # Tokens of a longer step are in several batches, and llama.cpp can drop only tokens of the last one: beyond it,
        # it goes back to a state of an earlier step.
        self._one_batch = min(BRANCHES, library().llama_n_batch(context))
        self._checkpoints: dict[int, memoryview] = {}
        self._before: dict[int, memoryview] = {}
        self._step = range(0)

    def begin_step(self, length: int, tokens: int) -> None:
        """Keep a checkpoint before a step, in which it may be stopped."""
        if length in self._checkpoints:
            self._before = {length: self._checkpoints[length]}
        else:
            self._before = {length: self._save(_RECURRENT)} if length else {}
        self._step = range(length, length + tokens) if tokens <= self._one_batch else range(0)

    def keep(self, length: int) -> None:
        """Keep a checkpoint at the end of the sequence, in place of the first one if there are too many."""
        if len(self._checkpoints) == self._most and length not in self._checkpoints:
            del self._checkpoints[min(self._checkpoints)]
        self._checkpoints[length] = self._save(_RECURRENT)

    def undo_step(self, length: int) -> None:
        """Go back to the checkpoint before the step: a step that failed has changed some layers and not others."""
        self._cut(length)

    def truncate(self, end: int) -> int:
        """Cut the sequence to the last position until `end` that it can be cut to; that position."""
        # llama.cpp does so once per step.
        if self._step.start < end < self._step.stop and self.drop(end):
            return end
        return self._cut(max((at for at in (*self._checkpoints, *self._before) if at <= end), default=0))

    def drop(self, start: int) -> bool:
        """See `KvCache`: llama.cpp refuses most of it. Checkpoints after `start` are forgotten."""
        self._checkpoints, self._before = (
            {at: state for at, state in kept.items() if at <= start} for kept in (self._checkpoints, self._before)
        )
        self._step = range(0)
        return super().drop(start)

    @contextmanager
    def branched(self, count: int) -> Iterator[None]:
        """See `KvCache`. Branches make steps of their own, and llama.cpp drops tokens of the last one only."""
        self._step = range(0)
        with super().branched(count):
            yield

    def restore(self, state: bytes | memoryview) -> int:
        """See `KvCache`."""
        length = super().restore(state)
        self.keep(length)
        return length

    def _cut(self, end: int) -> int:
        if end and not self._restore((self._checkpoints | self._before)[end], _RECURRENT):
            raise EdgetuneError(f"llama.cpp cannot restore a recurrent state: {last_errors()}")
        # The recurrent state is there already, so this drops only keys and values.
        self.drop(end)
        return end
