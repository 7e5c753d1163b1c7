"""The keys and values of a sequence, in buffers that are past and present at once, and saved states of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import VerificationError

Floats = NDArray[np.float32]

_STATE = struct.Struct("<4sII")
_MAGIC = b"ETS2"


class KvCache:
    """A buffer [heads, `context_length`, size] for each input in `heads`, which maps it to its heads and their size.

    `sides` is how many bindings a set of adapters needs, and `side` which one the next step takes; for `max_rollback`
    see `Engine`. VerificationError if there is no memory of such sizes.
    """

    sides = 1
    side = 0
    max_rollback: int | None = None

    def __init__(self, heads: Mapping[str, tuple[int, int]], context_length: int) -> None:
        self._buffers = {name: zeros(count, context_length, size) for name, (count, size) in heads.items()}
        self._context_length = context_length

    def bind(self, binding: Any, _side: int) -> None:  # noqa: ANN401 - onnxruntime's own
        """Bind the inputs and outputs of all steps."""
        for name, buffer in self._buffers.items():
            bind_input(binding, name, buffer)
            bind_output(binding, name.replace("past_key_values", "present"), buffer)

    def bind_step(self, binding: Any, tokens: int) -> None:  # noqa: ANN401 - as above
        """Bind what depends on the number of tokens of a step."""

    def put_prefix(self, arrays: Mapping[str, Floats]) -> None:
        """Write keys and values before the sequence."""
        for name, array in arrays.items():
            self._buffers[name][:, : array.shape[1]] = array

    def begin_step(self, length: int, tokens: int) -> None:
        """Prepare for a step of that many tokens after `length` ones."""

    def end_run(self) -> None:
        """Take over what a run of the graph computed."""

    def undo_step(self, length: int) -> None:
        """Undo a step after `length` tokens that was stopped."""

    def keep(self, length: int) -> None:
        """Make it possible to truncate the sequence, which has `length` tokens, to this length later."""

    def truncate(self, end: int) -> int:
        """Drop the sequence from position `end` on; its length afterwards, which may be less."""
        return end

    @contextmanager
    def branched(self, _start: int) -> Iterator[Callable[[int], int]]:
        """While the block runs, the tokens from position `start` on are those of branches.

        Gives a function that drops the branch from a position on, and returns its end, which may be less.
        """
        yield lambda end: end

    def save(self, begin: int, length: int) -> memoryview:
        """The state of the sequence from position `begin` to `length`."""
        parts = self._parts(begin, length)
        state = np.empty(_STATE.size + sum(part.nbytes for part in parts), np.uint8)
        _STATE.pack_into(state.data, 0, _MAGIC, begin, length)
        offset = _STATE.size
        for part in parts:
            state[offset : offset + part.nbytes].view(np.float32).reshape(part.shape)[...] = part
            offset += part.nbytes
        return state.data

    def restore(self, state: memoryview, begin: int) -> int:
        """Replace the sequence, which starts at position `begin`, by a saved one; its length.

        VerificationError for bytes that are not a state of these buffers.
        """
        magic, start, length = _STATE.unpack_from(state) if len(state) >= _STATE.size else (b"", 0, 0)
        parts = self._parts(begin, length)
        fits = start == begin <= length <= self._context_length
        if magic != _MAGIC or not fits or len(state) != _STATE.size + sum(part.nbytes for part in parts):
            raise VerificationError("a saved state does not fit this engine", "start without it")
        offset = _STATE.size
        for part in parts:
            part[...] = np.frombuffer(state, np.float32, part.size, offset).reshape(part.shape)
            offset += part.nbytes
        return int(length)

    def _parts(self, begin: int, length: int) -> list[Floats]:
        """What a state has, as views of the buffers."""
        return [buffer[:, begin:length] for buffer in self._buffers.values()]


def zeros(*shape: int) -> Floats:
    """An array of zeros; VerificationError if there is no memory for it."""
    try:
        return np.zeros(shape, np.float32)
    except (MemoryError, ValueError) as error:
        raise VerificationError(f"the graph of the base has states of no usable size: {error}") from error


def bind_input(binding: Any, name: str, array: Floats) -> None:  # noqa: ANN401 - as above
    """Bind an array as an input with a batch of one."""
    binding.bind_input(name, "cpu", 0, np.float32, (1, *array.shape), array.ctypes.data)


def bind_output(binding: Any, name: str, array: Floats) -> None:  # noqa: ANN401 - as above
    """Bind an array as an output with a batch of one."""
    binding.bind_output(name, "cpu", 0, np.float32, (1, *array.shape), array.ctypes.data)
