"""The engine on llama.cpp, called through ctypes: one mapped base, adapters loaded once, one sequence."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from edgetune_runtime.engines import check_kv
from edgetune_runtime.engines.base import (
    Logits,
    StepStopped,
    check_continuations,
    check_options,
    check_prefix_fits,
    check_tokens_fit,
)
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune_runtime.formats import BASE_FINGERPRINT
from edgetune_runtime.formats.gguf_adapter import check_adapter, invocation_of
from edgetune_runtime.formats.gguf_file import read_header
from edgetune_runtime.states.batches import CHUNK
from edgetune_runtime.threads.machine import usable_cores

from . import NAME
from .adapters import GgufAdapters
from .base import GgufBase
from .hybrid_cache import HybridCache
from .kv_cache import MAIN, KvCache
from .llama import StopFlag, decode_batch, end_threads, last_errors, library, make_context
from .needs import BRANCHES, recurrent_sizes, rollback_of
from .state import PrefixState, check_state, read_prefix
from .tiles import compute
from .tree import Continuation, ContinuationTree, groups

T = TypeVar("T")

_CONTEXT_FULL, _STOPPED = 1, 2
_MEASURED_OUTPUT_SHARE = 0.21
"""The share of the output matrix in the parameters of SmolLM2-135M, for `Engine.logits_excess`."""


class GgufEngine:
    """One GGUF base, mapped once, with its adapters (LoRA files and prefixes) and one sequence; see `Engine`.

    `context_length` is in tokens; `threads` defaults to the cores that this process may use, at most 8. For `kv` and
    `repack` see `Runtime.open`; prefixes need `kv` f16. UsageError when a number is not positive or the context is
    longer than the base was trained for.
    """

    has_sequence: ClassVar[Literal[True]] = True
    BATCH_COST: ClassVar[Mapping[int, float]] = {
        2: 1.6,
        3: 2.1,
        4: 2.3,
        5: 3.0,
        6: 3.4,
        7: 3.8,
        8: 3.5,
        12: 4.8,
        16: 5.4,
    }
    # Measured on SmolLM2-135M and Gemma 3 270M, whose vocabulary has more than half of the parameters.
    LOGITS_COST: ClassVar[Mapping[int, float]] = {2: 2.2, 3: 2.8, 4: 3.3, 6: 5.3, 8: 3.9, 12: 4.4, 16: 5.0}
    EVEN_ROWS: ClassVar[int] = 1
    adjusts_threads = True

    def __init__(
        self,
        path: Path,
        *,
        context_length: int,
        threads: int | None = None,
        kv: str | None = None,
        repack: bool | None = None,
    ) -> None:
        check_options(context_length, threads)
        self._kv = check_kv(NAME, kv)
        self._is_fork = False
        self._begin(GgufBase(path, context_length, repack), context_length, threads or usable_cores())

    def fork(self) -> GgufEngine:
        """Another engine with its own sequence, on the same base and adapters."""
        other = object.__new__(GgufEngine)
        other._kv, other._is_fork = self._kv, True
        other._begin(self._base, self.context_length, self.threads)
        return other

    def _begin(self, base: GgufBase, context_length: int, threads: int) -> None:
        self._base, self.context_length, self.threads = base, context_length, threads
        self.logits_excess = max(0.0, base.header.output_share - _MEASURED_OUTPUT_SHARE)
        self._adapters = base.adapters
        self._prefix: PrefixState | None = None
        model, state_bytes = base.model, recurrent_sizes(base.header).state_bytes
        kind = HybridCache if state_bytes else KvCache
        with self._adapters.in_first_step():
            self._context = make_context(
                model,
                context_length,
                threads,
                batch=CHUNK,
                sequences=kind.branches + 1,
                outputs=BRANCHES + 1,
                rollback=rollback_of(state_bytes),
                kv=self._kv,
            )
        self._free = weakref.finalize(self, _free_context, self._adapters, self._context)
        # Threads may compute with it until the process ends.
        self._free.atexit = False
        self._stop = StopFlag(self._context)
        self._used_threads, self._end_threads = threads, end_threads()
        self._cache = (
            HybridCache(self._context, model, state_bytes, context_length)
            if state_bytes
            else KvCache(self._context, model)
        )
        # A number for bases with recurrent layers.
        self.max_rollback = self._cache.max_rollback
        # llama.cpp's batches are no longer than the context.
        self._outputs = min(BRANCHES, context_length)
        self.tokenizer = base.vocabulary
        self._is_switched = False
        self._length = 0
        self._last: Logits | None = None

    @property
    def signatures(self) -> tuple[str, ...]:
        """The library, its version, the weights' layout and the KV data type; then the same with the other layout."""
        layouts = ("repacked", "mapped") if self._base.repacks else ("mapped", "repacked")
        return tuple(f"{self.library_version()}, {layout}, {self._kv}" for layout in layouts)

    @staticmethod
    def library_version() -> str:
        """llama-cpp-python and its version."""
        return f"llama-cpp-python {library().__version__}"

    @staticmethod
    def examine(path: Path, sha256: str) -> tuple[list[Path], str | None]:
        """The only file of the base; its digest is the fingerprint."""
        return [path], sha256

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """See `Engine`; VerificationError for a damaged file."""
        if name in self._adapters:
            return
        header = read_header(path)
        made_for = header.metadata.get(BASE_FINGERPRINT)
        if None not in {made_for, fingerprint} and made_for != fingerprint:
            raise IncompatibleError(f"adapter {name!r} was made for another base", "build the bundle again")
        if header.metadata.get("adapter.type") == "prefix":
            self._load_prefix(name, read_prefix(path, header, self._base.header, name))
            return
        check_adapter(header, self._base.header, name)
        if invocation_of(header, name) != tuple(invocation):
            actual, expected = invocation_of(header, name), tuple(invocation)
            message = f"adapter {name!r} has the invocation tokens {actual}, the manifest has {expected}"
            raise IncompatibleError(message, "build the bundle again")
        self._adapters.load_file(name, path)

    def unload_adapter(self, name: str) -> None:
        """See `Engine`."""
        self._adapters.unload(name)

    def activate(self, adapters: Mapping[str, float]) -> None:
        """See `Engine`."""
        prefix = self._adapters.switch(self._context, adapters)
        self._is_switched = True
        if prefix is not self._prefix:
            self._prefix = prefix
            self._rewind()

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """The longest sequence with these adapters: `context_length` minus the tokens of a prefix among them."""
        prefix = self._adapters.prefix_among(adapters)
        return self.context_length - (prefix.tokens if prefix else 0)

    def truncate(self, keep: int) -> int:
        """See `Engine`."""
        start = self._prefix.tokens if self._prefix else 0
        end = min(start + max(keep, 0), self._length)
        if start < end == self._length:
            return end - start
        self._last = None
        kept = self._cache.truncate(end) if 0 < end <= self._length else 0
        if kept:
            self._length = kept
        else:
            self._rewind()
        return self._length - start

    def use_threads(self, count: int) -> None:
        """Set the number of threads of the next steps, which does not change a bit of the results."""
        if count != self._used_threads:
            self._used_threads = count
            library().llama_set_n_threads(self._context, count, count)

    def end_threads(self) -> None:
        """End the threads that are kept for steps of the calling thread, which slow down those of others."""
        compute(self._end_threads)

    def stop_step(self) -> None:
        """Make the running step of another thread end soon with StepStopped; if none runs, maybe the next one."""
        self._stop.set()

    def decode(self, tokens: Sequence[int]) -> Logits:
        """See `Engine`."""
        check_tokens_fit(tokens, self._length, self.context_length, self.tokenizer.vocab_size)
        with self._step(len(tokens)):
            for part in _parts(tokens, CHUNK):
                self._append(part, [False] * (len(part) - 1) + [True])
                self._last = self._view(1)[0].copy()
        assert self._last is not None
        self._cache.keep(self._length)
        return self._last

    def decode_all(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """See `Engine`."""
        check_tokens_fit(tokens, self._length, self.context_length, self.tokenizer.vocab_size)
        first = len(tokens) - (len(tokens) if last is None else last)
        logits = np.empty((len(tokens) - first, self.tokenizer.vocab_size), np.float32)
        with self._step(len(tokens)):
            for start in range(0, len(tokens), self._outputs):
                part = tokens[start : start + self._outputs]
                outputs = [place >= first for place in range(start, start + len(part))]
                self._append(part, outputs)
                if any(outputs):
                    begin = max(0, start - first)
                    logits[begin : begin + sum(outputs)] = self._view(sum(outputs))
        self._last = logits[-1].copy()
        return logits

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """See `Engine`; the continuations form a prefix tree, decoded as branches of the sequence."""
        if self._last is None:
            raise UsageError("there are no logits to score continuations with", "decode at least one token first")
        ordered = sorted({tuple(tokens) for tokens in continuations})
        check_continuations(ordered, self._length, self.context_length, self.tokenizer.vocab_size)
        scores: dict[Continuation, float] = {}
        for group in groups(ordered, self._cache.branches, self._cache.cells - self._length):
            scores.update(self._score_group(group))
        return [scores[tuple(tokens)] for tokens in continuations]

    def save_state(self) -> memoryview:
        """The keys and values of the sequence, for `restore_state` on the same base."""
        return self._cache.save()

    def restore_state(self, state: memoryview) -> None:
        """Replace the sequence by a saved one with the same prefix; decode at least one token before `score`."""
        self._last = None
        try:
            check_state(state, self.context_length, self._base.header)
            self._length = self._cache.restore(state)
        except VerificationError:
            self._rewind()
            raise

    def close(self) -> None:
        """Free everything; a second call does nothing, and no other call may follow."""
        if self._free.alive:
            self._stop.clear()
            self.end_threads()
            if not self._is_fork:
                self.tokenizer.close()
            self._free()
            # The base is freed with its last reference.
            del self._base

    def _load_prefix(self, name: str, prefix: PrefixState) -> None:
        """Store a prefix, if llama.cpp accepts its state and returns the same bytes."""
        check_prefix_fits(name, prefix.tokens, self.context_length)
        if self._kv != "f16":
            # llama.cpp may rotate keys and values before it quantizes them, without reporting it.
            message = f"adapter {name!r} is a prefix, which works only with keys and values in f16, not {self._kv}"
            raise IncompatibleError(message, "open the bundle with kv f16")
        # A context of its own, as others may compute on those that there are.
        with self._adapters.in_first_step():
            context = make_context(self._base.model, prefix.tokens, 1, batch=1, kv=self._kv)
        try:
            cache = KvCache(context, self._base.model)
            cache.restore(prefix.data)
            same = cache.save() == prefix.data
        except VerificationError:
            same = False
        finally:
            library().llama_free(context)
        if not same:
            message = f"the KV cache of this llama.cpp has another layout than adapter {name!r} needs"
            raise IncompatibleError(message, "install a version of llama-cpp-python that edgetune-runtime allows")
        self._adapters.add_prefix(name, prefix)

    def _rewind(self) -> None:
        """Drop the sequence and restore the active prefix, if any."""
        self._last = None
        self._cache.drop(0)
        self._length = 0
        if self._prefix:
            self._length = self._cache.restore(self._prefix.data)

    @contextmanager
    def _step(self, tokens: int) -> Iterator[None]:
        """Undo a step that fails or is stopped: drop the tokens that it appended."""
        length = self._length
        self._cache.begin_step(length, tokens)
        try:
            yield
        except (StepStopped, EdgetuneError):
            self._cache.undo_step(length)
            self._length, self._last = length, None
            raise

    def _append(self, tokens: Sequence[int], outputs: Sequence[bool]) -> None:
        self._last = None
        positions = range(self._length, self._length + len(tokens))
        self._submit(tokens, positions, [(MAIN,)] * len(tokens), outputs)
        self._length += len(tokens)

    def _submit(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[tuple[int, ...]],
        outputs: Sequence[bool],
    ) -> None:
        """Decode one batch; a token that belongs to several sequences is computed once."""
        last_errors()
        self._stop.clear()
        with self._adapters.in_first_step() if self._is_switched else nullcontext():
            result = compute(lambda: decode_batch(self._context, tokens, positions, sequences, outputs))
        self._is_switched = False
        if result == _STOPPED:
            self._stop.clear()
            raise StepStopped
        if result == _CONTEXT_FULL:
            message = f"all {self._cache.cells} cells of the KV cache are in use"
            raise UsageError(message, "open the bundle with a larger context_length")
        if result != 0:
            raise EdgetuneError(f"llama.cpp cannot decode {len(tokens)} tokens (error {result}): {last_errors()}")

    def _view(self, count: int) -> Logits:
        """A view of the last batch's logits in llama.cpp's buffer, which the next batch overwrites."""
        logits = library().llama_get_logits(self._context)
        rows: Logits = np.ctypeslib.as_array(logits, (count, self.tokenizer.vocab_size))
        return rows

    def _score_group(self, group: Sequence[Continuation]) -> dict[Continuation, float]:
        tree = ContinuationTree(group)
        assert self._last is not None
        log_p = tree.steps_after([()], self._last[None])
        with self._cache.branched(len(group)):
            for nodes in _parts(tree.nodes, self._outputs):
                positions = [self._length + len(node) - 1 for node in nodes]
                sequences = [tuple(MAIN + 1 + number for number in tree.branches[node]) for node in nodes]
                self._submit([node[-1] for node in nodes], positions, sequences, [True] * len(nodes))
                log_p |= tree.steps_after(nodes, self._view(len(nodes)))
        return tree.totals(log_p)


def _free_context(adapters: GgufAdapters, context: Any) -> None:  # noqa: ANN401 - a bare pointer
    adapters.forget(context)
    library().llama_free(context)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


ENGINE = GgufEngine
"""The class for `Runtime.open(engine="gguf")`."""
