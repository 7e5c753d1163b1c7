"""The cache of a graph with recurrent layers, whose state cannot be rolled back by position as keys and values can.

There are two buffers for the state, its two sides: a step reads one and writes the other, so the state before the step
is still there. What the convolutions of a short step read gives the state after each of its tokens. Every other cut
needs a checkpoint (checkpoints.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgetune_runtime.engines.checkpoints import Checkpoints
from edgetune_runtime.formats.onnx_recurrence import Recurrence, present_name
from edgetune_runtime.states.batches import CHUNK

from .kv_cache import Floats, KvCache, bind_input, bind_output, zeros
from .needs import UNDONE, rollback_of


class HybridCache(KvCache):
    """As `KvCache`, with a recurrent state."""

    sides = 2

    def __init__(self, heads: Mapping[str, tuple[int, int]], recurrence: Recurrence, context_length: int) -> None:
        super().__init__(heads, context_length)
        self._shapes, self._outputs = recurrence.shapes, recurrence.conv_inputs
        self._states = zeros(self.sides, recurrence.values)
        self._inputs = {name: zeros(self._shapes[name][0] * UNDONE) for name in self._outputs}
        # Longer steps are not undone in part, so all layers write the same buffer. Left to onnxruntime, it would stay
        # allocated for each layer in each binding.
        widest = max((self._shapes[name][0] for name in self._outputs), default=0)
        self._unread = zeros(widest * CHUNK)
        self.max_rollback = rollback_of(recurrence.inputs_per_token)
        self._checkpoints = Checkpoints[Floats](self._states[0].nbytes, context_length)

    def bind(self, binding: Any, side: int) -> None:  # noqa: ANN401 - onnxruntime's own
        """See `KvCache`."""
        super().bind(binding, side)
        for name, state in self._by_name(self._states[side]).items():
            bind_input(binding, name, state)
        for name, state in self._by_name(self._states[1 - side]).items():
            bind_output(binding, present_name(name), state)

    def bind_step(self, binding: Any, tokens: int) -> None:  # noqa: ANN401 - as above
        """See `KvCache`."""
        for name, output in self._outputs.items():
            bind_output(binding, output, self._inputs_of(name, tokens))

    def begin_step(self, length: int, tokens: int) -> None:
        """See `KvCache`: keep a checkpoint. It is the side that the step reads, unless it writes that too."""
        state = self._states[self.side]
        undone = tokens if self.max_rollback and tokens <= UNDONE else 0
        self._checkpoints.begin_step(length, undone, lambda: state if tokens <= CHUNK else state.copy())

    def end_run(self) -> None:
        """See `KvCache`."""
        self.side = 1 - self.side

    def undo_step(self, length: int) -> None:
        """See `KvCache`."""
        self._cut(length)

    def keep(self, length: int) -> None:
        """See `KvCache`."""
        self._checkpoints.keep(length, self._states[self.side].copy())

    def truncate(self, end: int) -> int:
        """Cut the sequence to the last position until `end` that it can be cut to; that position."""
        if not self._checkpoints.splits_step(end):
            return self._cut(self._checkpoints.last_until(end))
        self._undo_until(end)
        self._checkpoints.cut(end)
        return end

    @contextmanager
    def branched(self, start: int) -> Iterator[Callable[[int], int]]:
        """See `KvCache`. Branches write both sides."""
        state = self._states[self.side].copy()
        self._checkpoints.forget_step()

        def restart(_end: int) -> int:
            self._states[self.side] = state
            return start

        try:
            yield restart
        finally:
            restart(start)

    def restore(self, state: memoryview, begin: int) -> int:
        """See `KvCache`."""
        length = super().restore(state, begin)
        self._checkpoints.cut(0)
        self.keep(length)
        return length

    def _parts(self, begin: int, length: int) -> list[Floats]:
        return [*super()._parts(begin, length), self._states[self.side]]

    def _cut(self, end: int) -> int:
        self._states[self.side] = self._checkpoints[end] if end else 0
        self._checkpoints.cut(end)
        return end

    def _undo_until(self, end: int) -> None:
        """Compute the state at a position within the last step, from the one before it and what convolutions read."""
        step = self._checkpoints.step
        before = self._checkpoints[step.start] if step.start else np.zeros_like(self._states[0])
        earlier = self._by_name(before)
        for name, state in self._by_name(self._states[self.side]).items():
            read = self._inputs_of(name, len(step))[:, : end - step.start]
            state[...] = np.concatenate([earlier[name], read], axis=1)[:, -state.shape[1] :]

    def _by_name(self, state: Floats) -> dict[str, Floats]:
        """Views of a state by the names of inputs."""
        ends = np.cumsum([0, *(math.prod(shape) for shape in self._shapes.values())])
        views = zip(self._shapes.items(), ends, ends[1:], strict=False)
        return {name: state[start:end].reshape(shape) for (name, shape), start, end in views}

    def _inputs_of(self, name: str, tokens: int) -> Floats:
        """What the convolution of a state read in a step of so many tokens, [channels, tokens]."""
        channels = self._shapes[name][0]
        buffer = self._inputs[name] if tokens <= UNDONE else self._unread
        return buffer[: channels * tokens].reshape(channels, tokens)
