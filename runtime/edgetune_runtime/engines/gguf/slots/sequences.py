"""A context of a model with slots: several sequences, each with its slot, that decode in one batch."""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune_runtime.engines.base import BatchSizes, Logits, StepStopped
from edgetune_runtime.engines.gguf.llama import StopFlag, decode_batch, last_errors, library, make_context
from edgetune_runtime.engines.gguf.tiles import compute
from edgetune_runtime.errors import EdgetuneError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader

from .model import MAX_SLOTS, compose
from .pool import SlotPool
from .requirements import control_tokens

OUTPUTS = 32
"""Tokens of a batch that can have logits. llama.cpp keeps a row of them for each."""
_FACTOR = ".lora_a"
_LOWEST = -1e30
_STOPPED = 2
_HEADER = struct.Struct("<Ii")
_COUNT = struct.Struct("<I")


@dataclass(frozen=True)
class Row:
    """Tokens that a batch appends to a sequence of `start` tokens with a slot; the last `outputs` get logits."""

    sequence: int
    slot: int
    start: int
    tokens: Sequence[int]
    outputs: int


class SlotSequences:
    """The sequences of a model with slots, each of `context_length` tokens.

    Thread-safe: one step, or one change of a sequence, at a time.
    """

    def __init__(
        self,
        path: Path,
        header: GgufHeader,
        sizes: BatchSizes,
        *,
        context_length: int,
        threads: int,
        batch: int,
        kv: str,
        repack: bool,
    ) -> None:
        self.count = sizes.sequences
        # All of them, so that answers do not depend on the number of slots.
        self._never = control_tokens(header)[:MAX_SLOTS]
        slots = min(sizes.adapters, len(self._never))
        self._model = compose(path, header, slots, sizes.rank, repack=repack)
        self.pool = SlotPool(self._model, header)
        self._rank = sizes.rank
        self._ranks: dict[str, int] = {}
        llama = library()
        try:
            self._context = make_context(
                self._model.pointer,
                context_length,
                threads,
                batch=batch,
                sequences=self.count,
                kv=kv,
                outputs=OUTPUTS,
                unified=False,
            )
        except BaseException:
            self._model.close()
            raise
        self._free = weakref.finalize(self, llama.llama_free, self._context)
        self._memory = llama.llama_get_memory(self._context)
        self._vocab_size: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model.pointer))
        self._stop = StopFlag(self._context)
        self._threads = threads
        self._lock = threading.RLock()
        self._unused = list(range(self.count))

    def add(self, name: str, path: Path, adapter: GgufHeader) -> None:
        """Let sequences have the adapter in a file with this checked header, if it fits in a slot."""
        factors = {weight: tensor for weight, tensor in adapter.tensors.items() if weight.endswith(_FACTOR)}
        rank = max((tensor.shape[1] for tensor in factors.values()), default=0)
        changes = (weight.removesuffix(_FACTOR) for weight in factors)
        if factors and rank <= self._rank and all(map(self._model.can_change, changes)):
            self._ranks[name] = rank
            self.pool.add(name, path)

    def remove(self, name: str) -> None:
        """Forget an adapter that no call uses."""
        if self._ranks.pop(name, None) is not None:
            self.pool.remove(name)

    def can_hold(self, adapters: Mapping[str, float]) -> bool:
        """Whether a slot can have the sum of these adapters."""
        active = [name for name, scale in adapters.items() if scale]
        return all(name in self._ranks for name in active) and sum(map(self._ranks.__getitem__, active)) <= self._rank

    def take(self) -> int:
        """A sequence that is not in use, the lowest, because only neighbours share a batch; UsageError without one."""
        with self._lock:
            if not self._unused:
                raise UsageError(f"all {self.count} sequences of the batch are in use", "close one of them first")
            sequence = min(self._unused)
            self._unused.remove(sequence)
            return sequence

    def give_back(self, sequence: int) -> None:
        """Drop a sequence and let others use it."""
        with self._lock:
            self.drop(sequence, 0)
            self._unused.append(sequence)

    def use_threads(self, count: int) -> None:
        """Set the number of threads of the next steps."""
        with self._lock:
            if count != self._threads:
                self._threads = count
                library().llama_set_n_threads(self._context, count, count)

    def stop(self) -> None:
        """Stop the running step; if none runs, maybe the next one."""
        self._stop.set()

    def decode(self, rows: Sequence[Row]) -> list[Logits]:
        """Append tokens in one batch; the logits of each row's outputs. An exception leaves all sequences as before."""
        with self._lock:
            try:
                self._submit(rows)
            except BaseException:
                for row in rows:
                    self.drop(row.sequence, row.start)
                raise
            total = sum(row.outputs for row in rows)
            if not total:
                return [np.empty((0, self._vocab_size), np.float32) for _ in rows]
            logits = np.ctypeslib.as_array(library().llama_get_logits(self._context), (total, self._vocab_size)).copy()
            # A token that chooses a slot is no token of an answer.
            logits[:, self._never] = _LOWEST
            return np.split(logits, np.cumsum([row.outputs for row in rows])[:-1])

    def drop(self, sequence: int, start: int) -> None:
        """Drop a sequence from position `start` on."""
        with self._lock:
            library().llama_memory_seq_rm(self._memory, sequence, start, -1)

    def save(self, sequence: int) -> bytearray:
        """The state of a sequence, as that of a context with one sequence."""
        with self._lock:
            llama = library()
            size: int = llama.llama_state_seq_get_size(self._context, sequence)
            state = bytearray(size)
            if llama.llama_state_seq_get_data(self._context, _address(state), size, sequence) != size:
                raise EdgetuneError(f"llama.cpp cannot save a state of {size} bytes: {last_errors()}")
        # Before and after the cells of this sequence is a count of zero for each other one.
        begin = _HEADER.size + _COUNT.size * (1 + sequence)
        end = size - _COUNT.size * (self.count - 1 - sequence)
        magic, _ = _HEADER.unpack_from(state)
        return bytearray(b"".join((_HEADER.pack(magic, 0), _COUNT.pack(1), memoryview(state)[begin:end])))

    def restore(self, sequence: int, state: bytes | bytearray | memoryview) -> int:
        """Replace a sequence by a saved state; its length. VerificationError, and an empty sequence, if refused."""
        begin = _HEADER.size + _COUNT.size
        empty = _COUNT.pack(0) * (self.count - 1)
        data = bytearray(
            b"".join((memoryview(state)[: _HEADER.size], _COUNT.pack(self.count), memoryview(state)[begin:], empty))
        )
        llama = library()
        with self._lock:
            self.drop(sequence, 0)
            last_errors()
            if not llama.llama_state_seq_set_data(self._context, _address(data), len(data), sequence):
                self.drop(sequence, 0)
                raise VerificationError(f"llama.cpp refused a saved state: {last_errors()}", "start without it")
            length: int = llama.llama_memory_seq_pos_max(self._memory, sequence) + 1
            return length

    def close(self) -> None:
        """Free everything; a second call does nothing, and no other call may follow."""
        self._free()
        self._model.close()

    def _submit(self, rows: Sequence[Row]) -> None:
        tokens: list[int] = []
        for row in rows:
            tokens += self._model.tokens_for(row.slot, row.tokens, begins=row.start == 0)
        positions = [row.start + number for row in rows for number in range(len(row.tokens))]
        members = [(row.sequence,) for row in rows for _ in row.tokens]
        outputs = [number >= len(row.tokens) - row.outputs for row in rows for number in range(len(row.tokens))]
        last_errors()
        self._stop.clear()
        result = compute(lambda: decode_batch(self._context, tokens, positions, members, outputs))
        if result == _STOPPED:
            self._stop.clear()
            raise StepStopped
        if result != 0:
            raise EdgetuneError(f"llama.cpp cannot decode {len(tokens)} tokens (error {result}): {last_errors()}")


def _address(data: bytearray) -> Any:  # noqa: ANN401 - a bare pointer
    return ctypes.cast((ctypes.c_uint8 * len(data)).from_buffer(data), ctypes.POINTER(ctypes.c_uint8))
