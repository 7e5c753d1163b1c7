"""The sequences of a batch: each has its adapters in a slot, so that it shares steps with others that have others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Self, cast

import numpy as np

from edgetune_runtime.engines.base import Engine, Logits, check_continuations, check_tokens_fit
from edgetune_runtime.engines.gguf.costs import BATCH_COST, LOGITS_COST
from edgetune_runtime.engines.gguf.state import check_state
from edgetune_runtime.engines.scores import scores_in_order
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader

from .pool import BASE
from .sequences import OUTPUTS, Row, SlotSequences
from .states import in_slot


class SlotBatch:
    """The sequences beside the engine `first`, on its base, in steps of at most `batch` tokens; see `Batch`."""

    def __init__(self, first: Engine, sequences: SlotSequences, batch: int) -> None:
        self._first, self._sequences, self._batch = first, sequences, batch

    def add(self, name: str, path: Path, adapter: GgufHeader) -> None:
        """Let sequences have the adapter in a file with this checked header, if it fits in a slot."""
        self._sequences.add(name, path, adapter)

    def remove(self, name: str) -> None:
        """Forget an adapter that no call uses."""
        self._sequences.remove(name)

    def can_hold(self, adapters: Mapping[str, float]) -> bool:
        """See `Batch`."""
        return self._sequences.can_hold(adapters)

    def sequence(self) -> SlotEngine:
        """See `Batch`."""
        return SlotEngine(self._first, self._sequences, self._batch)

    def can_join(self, engine: Engine) -> bool:
        """See `Batch`; the first token of a sequence chooses its slot."""
        return not cast("SlotEngine", engine).is_empty

    def decode(self, steps: Sequence[tuple[Engine, int]]) -> list[Logits]:
        """See `Batch`."""
        own = [(cast("SlotEngine", engine), [token]) for engine, token in steps]
        # llama.cpp computes sequences together whose numbers rise by one.
        ordered = sorted(own, key=lambda step: step[0].number)
        rows = [engine.row(tokens, 1) for engine, tokens in ordered]
        logits = {}
        for (engine, tokens), after in zip(ordered, self._sequences.decode(rows), strict=True):
            engine.appended(tokens, after)
            logits[engine.number] = after
        return [logits[engine.number] for engine, _ in own]

    def close(self) -> None:
        """Free everything; a second call does nothing, and no other call may follow."""
        self._sequences.close()


class SlotEngine:
    """One of `sequences`, whose `number` it has; see `Engine`. Its adapters must be among those that slots can hold.

    What it has computed stays that of the adapters it was computed with when they are switched.
    """

    BATCH_COST: ClassVar[Mapping[int, float]] = BATCH_COST
    LOGITS_COST: ClassVar[Mapping[int, float]] = LOGITS_COST
    adjusts_threads = True
    batch = None

    def __init__(self, first: Engine, sequences: SlotSequences, batch: int) -> None:
        self.logits_excess = first.logits_excess
        self.context_length, self.threads, self.kv_bytes = first.context_length, first.threads, first.kv_bytes
        self.tokenizer, self.signatures = first.tokenizer, first.signatures
        self._first, self._sequences, self._batch = first, sequences, batch
        self.number = sequences.take()
        self._uses = ExitStack()
        self._use = BASE
        # The slot that the keys and values in the cache choose.
        self._slot = 0
        self._length = 0
        self._last: Logits | None = None
        self._is_closed = False

    def fork(self) -> Self:
        """Another sequence of the batch."""
        return type(self)(self._first, self._sequences, self._batch)

    @property
    def is_empty(self) -> bool:
        """Whether the sequence has no tokens."""
        return self._length == 0

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """See `Engine`."""
        self._first.load_adapter(name, path, fingerprint, invocation)

    def unload_adapter(self, name: str) -> None:
        """See `Engine`."""
        self._first.unload_adapter(name)

    def activate(self, adapters: Mapping[str, float]) -> None:
        """See `Engine`; fills a slot if none has these adapters."""
        with ExitStack() as stack:
            self._use = stack.enter_context(self._sequences.pool.use(adapters))
            self._uses.close()
            self._uses = stack.pop_all()

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """See `Engine`."""
        return self._first.capacity(adapters)

    def truncate(self, keep: int) -> int:
        """See `Engine`."""
        end = max(keep, 0)
        if end < self._length:
            self._last = None
            self._sequences.drop(self.number, end)
            self._length = end
        return self._length

    def use_threads(self, count: int) -> None:
        """See `Engine`."""
        self._sequences.use_threads(count)

    def stop_step(self) -> None:
        """See `Engine`; stops the step of all that share it."""
        self._sequences.stop()

    def decode(self, tokens: Sequence[int]) -> Logits:
        """See `Engine`."""
        last: Logits = self._decode(tokens, 1, self._batch)[0]
        return last

    def decode_all(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """See `Engine`."""
        return self._decode(tokens, len(tokens) if last is None else last, min(OUTPUTS, self._batch))

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """See `Engine`."""
        if self._last is None:
            raise UsageError("there are no logits to score continuations with", "decode at least one token first")
        start, last = self._length, self._last
        check_continuations(continuations, start, self.context_length, self.tokenizer.vocab_size)

        def logits_after(kept: int, tokens: Sequence[int]) -> Logits:
            self.truncate(start + kept)
            return self.decode_all(tokens)

        try:
            return scores_in_order(continuations, last, logits_after)
        finally:
            self.truncate(start)
            self._last = last

    def save_state(self) -> memoryview:
        """See `Engine`; the state does not depend on the slot."""
        return memoryview(in_slot(self._sequences.save(self.number), 0))

    def restore_state(self, state: memoryview) -> None:
        """See `Engine`."""
        self._last, self._length = None, 0
        try:
            check_state(state, self.context_length)
            self._length = self._sequences.restore(self.number, in_slot(state, self._use.slot))
        except VerificationError:
            self._sequences.drop(self.number, 0)
            raise
        self._slot = self._use.slot

    def close(self) -> None:
        """See `Engine`."""
        if not self._is_closed:
            self._is_closed = True
            self._uses.close()
            self._sequences.give_back(self.number)

    def row(self, tokens: Sequence[int], outputs: int) -> Row:
        """What appends tokens to the sequence, whose cache first chooses the slot of its adapters."""
        if self.is_empty:
            self._slot = self._use.slot
        elif self._slot != self._use.slot:
            state = in_slot(self._sequences.save(self.number), self._use.slot)
            self._length = self._sequences.restore(self.number, state)
            self._slot = self._use.slot
        return Row(self.number, self._slot, self._length, tokens, outputs)

    def appended(self, tokens: Sequence[int], logits: Logits) -> None:
        """Count tokens that a batch has appended; `logits` are those after the last of them."""
        self._length += len(tokens)
        self._last = logits[-1] if len(logits) else None

    def _decode(self, tokens: Sequence[int], outputs: int, size: int) -> Logits:
        """Append tokens, at most `size` in a step; logits after the last `outputs` of them."""
        check_tokens_fit(tokens, self._length, self.context_length, self.tokenizer.vocab_size)
        start, first, rows = self._length, len(tokens) - outputs, []
        try:
            for begin in range(0, len(tokens), size):
                part = tokens[begin : begin + size]
                own = max(0, begin + len(part) - max(first, begin))
                (logits,) = self._sequences.decode([self.row(part, own)])
                self.appended(part, logits)
                rows.append(logits)
        except BaseException:
            self.truncate(start)
            raise
        joined: Logits = np.concatenate(rows)
        return joined
