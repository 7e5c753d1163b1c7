"""The cache of a model with recurrent layers, whose state cannot be rolled back by position as keys and values can.

llama.cpp drops up to ROLLBACK tokens (needs.py) from the end of the last step only. Every other cut needs a checkpoint
(checkpoints.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from edgetune_runtime.engines.checkpoints import Checkpoints
from edgetune_runtime.errors import EdgetuneError

from .kv_cache import KvCache
from .llama import last_errors
from .needs import BRANCHES, HYBRID_BRANCHES, rollback_of

_RECURRENT = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY."""


class HybridCache(KvCache):
    """As `KvCache`, with checkpoints of a recurrent state of `state_bytes`; `context_length` is in tokens."""

    branches = HYBRID_BRANCHES

    def __init__(self, context: Any, model: Any, state_bytes: int, context_length: int) -> None:  # noqa: ANN401 - bare pointers
        super().__init__(context, model)
        self.max_rollback = rollback_of(state_bytes)
        self._checkpoints = Checkpoints[memoryview](state_bytes, context_length)

    def begin_step(self, length: int, tokens: int) -> None:
        """See `KvCache`."""
        # Tokens of a longer step are in several batches, and llama.cpp can drop only tokens of the last one: beyond it,
        # it goes back to a state of an earlier step.
        undone = tokens if tokens <= BRANCHES else 0
        self._checkpoints.begin_step(length, undone, partial(self._save, _RECURRENT))

    def keep(self, length: int) -> None:
        """See `KvCache`."""
        self._checkpoints.keep(length, self._save(_RECURRENT))

    def undo_step(self, length: int) -> None:
        """Go back to the checkpoint before the step: a step that failed has changed some layers and not others."""
        self._cut(length)

    def truncate(self, end: int) -> int:
        """Cut the sequence to the last position until `end` that it can be cut to; that position."""
        # llama.cpp does so once per step.
        if self._checkpoints.splits_step(end) and self.drop(end):
            return end
        return self._cut(self._checkpoints.last_until(end))

    def drop(self, start: int) -> bool:
        """See `KvCache`: llama.cpp refuses most of it. Checkpoints after `start` are forgotten."""
        self._checkpoints.cut(start)
        return super().drop(start)

    @contextmanager
    def branched(self, count: int) -> Iterator[None]:
        """See `KvCache`. Branches make steps of their own, and llama.cpp drops tokens of the last one only."""
        self._checkpoints.forget_step()
        with super().branched(count):
            yield

    def restore(self, state: bytes | memoryview) -> int:
        """See `KvCache`."""
        length = super().restore(state)
        self.keep(length)
        return length

    def _cut(self, end: int) -> int:
        if end and not self._restore(self._checkpoints[end], _RECURRENT):
            raise EdgetuneError(f"llama.cpp cannot restore a recurrent state: {last_errors()}")
        # The recurrent state is there already, so this drops only keys and values.
        self.drop(end)
        return end
