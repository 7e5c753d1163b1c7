"""The cache of a model with recurrent layers, whose state cannot be rolled back by position as keys and values can.

llama.cpp drops tokens from the end of the last step only, of up to ROLLBACK tokens. Every other cut needs a checkpoint
of the recurrent state at its position: there is one at the end of each part of a prompt, of each restored state, and
before the last step. The engine cuts to the last checkpoint before any other position.
"""

from __future__ import annotations

from typing import Any

from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.states.batches import CHUNK

from .kv_cache import KvCache
from .llama import last_errors

ROLLBACK = 16
"""Tokens that llama.cpp can drop after a step: more than a draft has. It keeps a recurrent state for each."""
_ONE_BATCH = 32
"""Tokens of a longer step are in several batches, and llama.cpp drops only tokens of the last one."""
_BRANCHES = 1
"""Each branch needs as many recurrent states as the sequence itself."""
CHECKPOINTS_BYTES = 32_000_000
"""Bytes of checkpoints of one sequence; at least two are kept, whatever their size."""

_RECURRENT = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY."""


def rollback_of(state_bytes: int) -> int:
    """How many tokens llama.cpp can drop from the end of a step; none if the states for it would take too much."""
    return ROLLBACK if (1 + _BRANCHES) * (1 + ROLLBACK) * state_bytes <= CHECKPOINTS_BYTES else 0


def most_checkpoints(state_bytes: int) -> int:
    """Checkpoints that are kept of a sequence whose recurrent state has this size."""
    return max(2, CHECKPOINTS_BYTES // state_bytes)


def states_of(state_bytes: int, context_length: int) -> int:
    """The recurrent states of this size that a context holds, in llama.cpp and as checkpoints; 0 without any."""
    if not state_bytes:
        return 0
    parts = context_length // CHUNK + 2
    return (1 + _BRANCHES) * (1 + rollback_of(state_bytes)) + min(parts, most_checkpoints(state_bytes)) + 1


class HybridCache(KvCache):
    """As `KvCache`, with checkpoints; `state_bytes` is the size of the recurrent state of a sequence."""

    branches = _BRANCHES

    def __init__(self, context: Any, model: Any, state_bytes: int) -> None:  # noqa: ANN401 - bare pointers
        super().__init__(context, model)
        self.max_rollback = rollback_of(state_bytes)
        self._most = most_checkpoints(state_bytes)
        self._checkpoints: dict[int, memoryview] = {}
        self._before: dict[int, memoryview] = {}
        self._step = range(0)

    def begin_step(self, length: int, tokens: int) -> None:
        """Keep a checkpoint before a step, in which it may be stopped."""
        if length in self._checkpoints:
            self._before = {length: self._checkpoints[length]}
        else:
            self._before = {length: self._save(_RECURRENT)} if length else {}
        self._step = range(length, length + tokens) if tokens <= _ONE_BATCH else range(0)

    def keep(self, length: int) -> None:
        """Keep a checkpoint at the end of the sequence, in place of the first one if there are too many."""
        if len(self._checkpoints) == self._most:
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
