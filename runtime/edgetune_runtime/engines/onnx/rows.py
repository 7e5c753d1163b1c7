"""Keys and values of several sequences side by side, and steps that append a token to neighbouring ones at once.

Each row of such a step has its own adapter: low-rank factors are stacked to [rows, in, rank] and [rows, rank, out],
with zeros where an adapter has a lower rank, and the products of the graph become batched ones. A batched product
computes each row as a step of that sequence alone does. So do the products with the base's weights on processors with
AVX-512, but not on those with AVX2 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import VerificationError

from .arrays import Arrays
from .ort import run_binding

Buffers = dict[str, NDArray[np.float32]]
"""By the name of an input with past keys or values."""


@dataclass
class Binding:
    """onnxruntime's binding, the adapter tensors that it points to, and the number of tokens of its input."""

    io: Any
    tensors: Arrays
    count: int = 0


@dataclass(frozen=True)
class RowStep:
    """A token for the sequence in row `row`, which has `length` tokens, with an adapter's tensors."""

    row: int
    token: int
    length: int
    tensors: Arrays


class Rows:
    """The keys and values of up to `count` sequences, and the factors of their adapters.

    Safe to use from threads whose sequences differ.
    """

    def __init__(self, session: Any, count: int, context_length: int, head_size: int) -> None:  # noqa: ANN401 - an InferenceSession
        self.count = count
        self._session = session
        self._buffers = _buffers(session, count, context_length, head_size)
        self._free = set(range(count))
        self._stack = _Stack(count)
        self._bindings: dict[tuple[int, int, bool], Binding] = {}
        self._lock = Lock()

    def take(self) -> int | None:
        """The first row without a sequence; None if there is none."""
        with self._lock:
            row = min(self._free, default=None)
            if row is not None:
                self._free.remove(row)
            return row

    def release(self, row: int) -> None:
        """Give a row back; the last one also frees what was made for common steps."""
        with self._lock:
            self._free.add(row)
            if len(self._free) == self.count:
                # A binding keeps the session, and with it the mapped weights.
                self._bindings.clear()
                self._stack = _Stack(self.count)

    def buffers(self, row: int) -> Buffers:
        """The buffers [heads, context, head size] of a row."""
        return {name: buffer[row] for name, buffer in self._buffers.items()}

    def bind(self, rows: slice, tensors: Arrays) -> Binding:
        """A binding of the rows' keys and values, and of adapter tensors; other slots keep their empty defaults."""
        io = self._session.io_binding()
        for name, buffer in self._buffers.items():
            part = buffer[rows]
            io.bind_input(name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            present = name.replace("past_key_values", "present")
            io.bind_output(present, "cpu", 0, np.float32, part.shape, part.ctypes.data)
        for name, tensor in tensors.items():
            io.bind_input(name, "cpu", 0, np.float32, tensor.shape, tensor.ctypes.data)
        return Binding(io, tensors)

    def decode(self, steps: Sequence[RowStep], vocab_size: int, options: Any) -> dict[int, Logits]:  # noqa: ANN401 - RunOptions
        """Append a token to each of these rows; logits [vocab] by row. StepStopped if `options` stop it."""
        logits: dict[int, Logits] = {}
        for part in _neighbours(steps):
            io = self._binding_of(part).io
            ids = np.array([[step.token] for step in part], np.int64)
            lengths = np.array([[step.length + 1] for step in part])
            mask = (np.arange(lengths.max()) < lengths).astype(np.int64)
            out = np.empty((len(part), 1, vocab_size), np.float32)
            for name, array in (("input_ids", ids), ("attention_mask", mask)):
                io.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
            io.bind_output("logits", "cpu", 0, np.float32, out.shape, out.ctypes.data)
            run_binding(self._session, io, options)
            logits |= {step.row: row[0] for step, row in zip(part, out, strict=True)}
        return logits

    def _binding_of(self, steps: Sequence[RowStep]) -> Binding:
        """The binding of rows that follow each other, after their adapters are in the stack."""
        rows = slice(steps[0].row, steps[-1].row + 1)
        has_adapters = any(step.tensors for step in steps)
        key = (rows.start, rows.stop, has_adapters)
        with self._lock:
            for step in steps if has_adapters else ():
                if self._stack.put(step.row, step.tensors):
                    self._bindings.clear()
            if key not in self._bindings:
                stacked = {name: array[rows] for name, array in self._stack.arrays.items()} if has_adapters else {}
                self._bindings[key] = self.bind(rows, stacked)
            return self._bindings[key]


class _Stack:
    """Factors of the rows' adapters by slot: A [rows, in, rank] and B [rows, rank, out]."""

    def __init__(self, count: int) -> None:
        self.arrays: Buffers = {}
        self._tensors: list[Arrays] = [{}] * count

    def put(self, row: int, tensors: Arrays) -> bool:
        """Write an adapter's tensors into a row; whether arrays were replaced by larger ones."""
        if self._tensors[row] is tensors or not (self._tensors[row] or tensors):
            return False
        grown = [name for name, array in tensors.items() if self._grows(name, array)]
        for name, stacked in self.arrays.items():
            part, array = stacked[row], tensors.get(name, stacked[row, :0, :0])
            inputs, outputs = array.shape
            part[:inputs, :outputs] = array
            part[inputs:], part[:, outputs:] = 0, 0
        self._tensors[row] = tensors
        return bool(grown)

    def _grows(self, name: str, array: NDArray[np.float32]) -> bool:
        """Make room for an array in its stack; whether there was too little."""
        old = self.arrays.get(name, np.zeros((len(self._tensors), 0, 0), np.float32))
        shape = np.maximum(old.shape[1:], array.shape)
        if tuple(shape) == old.shape[1:]:
            return False
        self.arrays[name] = np.zeros((len(old), *shape), np.float32)
        self.arrays[name][:, : old.shape[1], : old.shape[2]] = old
        return True


def _neighbours(steps: Sequence[RowStep]) -> Iterator[list[RowStep]]:
    """The steps in groups of rows that follow each other."""
    ordered = sorted(steps, key=lambda step: step.row)
    for _, group in groupby(enumerate(ordered), lambda item: item[1].row - item[0]):
        yield [step for _, step in group]


def _buffers(session: Any, count: int, context_length: int, head_size: int) -> Buffers:  # noqa: ANN401 - as above
    """A buffer [count, heads, context, head size] for each input with past keys or values."""
    inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    try:
        return {
            value.name: np.zeros((count, int(value.shape[1]), context_length, head_size), np.float32)
            for value in inputs
        }
    except (MemoryError, ValueError) as error:
        raise VerificationError(f"the graph of the base has keys and values of no usable size: {error}") from error
