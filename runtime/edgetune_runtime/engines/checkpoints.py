"""Checkpoints of a recurrent state, which cannot be rolled back by position as keys and values can.

There is one at the end of each part of a prompt, of each restored state, and before the last step. A sequence can be
cut to any of them, and to a position within the last step if the engine can undo a part of it. Any other cut is to the
last checkpoint before its position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from edgetune_runtime.states.batches import CHUNK

CHECKPOINTS_BYTES = 32_000_000
"""Bytes of checkpoints of one sequence, of which at least two are kept, and no more than its context has parts."""

State = TypeVar("State")


class Checkpoints(Generic[State]):
    """The checkpoints of a sequence by its length at each of them, and the positions of the last step.

    `state_bytes` is the size of the recurrent state, and `context_length` that of the longest sequence.
    """

    def __init__(self, state_bytes: int, context_length: int) -> None:
        self._max_kept = checkpoints_of(state_bytes, context_length)
        self._kept: dict[int, State] = {}
        self._before: dict[int, State] = {}
        self.step = range(0)
        """The positions that the last step appended, if it can be undone in part."""

    def __getitem__(self, length: int) -> State:
        """The checkpoint at this length."""
        return (self._kept | self._before)[length]

    def begin_step(self, length: int, tokens: int, save: Callable[[], State]) -> None:
        """Keep a checkpoint before a step of so many tokens, in which it may be stopped."""
        if length in self._kept:
            self._before = {length: self._kept[length]}
        else:
            self._before = {length: save()} if length else {}
        self.step = range(length, length + tokens)

    def forget_step(self) -> None:
        """Forget the last step, and the checkpoint before it."""
        self._before, self.step = {}, range(0)

    def keep(self, length: int, state: State) -> None:
        """Keep a checkpoint at the end of the sequence, in place of the first one if there are too many."""
        if len(self._kept) == self._max_kept and length not in self._kept:
            del self._kept[min(self._kept)]
        self._kept[length] = state

    def splits_step(self, end: int) -> bool:
        """Whether a cut to `end` leaves a part of the last step."""
        return self.step.start < end < self.step.stop

    def last_until(self, end: int) -> int:
        """The last length until `end` that has a checkpoint; 0, which needs none, if there is none."""
        return max((at for at in (*self._kept, *self._before) if at <= end), default=0)

    def cut(self, end: int) -> None:
        """Forget the last step, and the checkpoints after `end`."""
        self._kept, self._before = (
            {at: state for at, state in kept.items() if at <= end} for kept in (self._kept, self._before)
        )
        self.step = range(0)


def checkpoints_of(state_bytes: int, context_length: int) -> int:
    """How many checkpoints of this size a sequence has at most, without the one before the last step."""
    return min(context_length // CHUNK + 2, max(2, CHECKPOINTS_BYTES // state_bytes))
