"""The engine on plain onnxruntime: one mapped base, with KV buffers and adapters bound as inputs.

Past and present keys (and values) of a layer share one buffer, so a step copies nothing; the length of the attention
mask is the filled length. Each set of active adapters has its own binding, and a switch selects a binding.
(`run_with_iobinding` ignores the active adapters of RunOptions, so their tensors are bound as inputs.)
"""

from __future__ import annotations

import threading
from collections import ChainMap, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import numpy as np

from edgetune_runtime.engines import check_kv
from edgetune_runtime.engines.base import (
    Logits,
    StepStopped,
    check_context_length,
    check_continuations,
    check_options,
    check_prefix_fits,
    check_scales,
    check_tokens_fit,
    prefix_among,
)
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.formats import BASE_FINGERPRINT
from edgetune_runtime.formats.onnx_file import read_onnx
from edgetune_runtime.formats.onnx_operators import check_operators
from edgetune_runtime.formats.onnx_prefix import check_prefix_arrays, is_past, past_inputs
from edgetune_runtime.formats.onnx_recurrence import recurrence_of
from edgetune_runtime.formats.onnx_slots import check_arrays, slots_of
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME
from edgetune_runtime.states.batches import CHUNK
from edgetune_runtime.threads.machine import threads_for

from . import NAME
from .arrays import Arrays, read_arrays, sum_of_adapters, to_float32
from .config import CONFIG_NAME, read_config
from .hybrid_cache import HybridCache
from .kv_cache import KvCache
from .ort import graph_errors, library_version, open_session, run_binding, run_options
from .scores import scores_in_order
from .tokenizers import JsonTokenizer

_BINDINGS = 32
"""Number of adapter sets whose bindings are cached; a set of several adapters also caches the summed tensors."""


@dataclass
class _Binding:
    """onnxruntime's binding, the adapter tensors that it points to, and the number of tokens of its input."""

    io: Any
    tensors: Arrays
    count: int = 0


class OnnxEngine:
    """One ONNX base with its adapters and one sequence; see `Engine`.

    `path` is model.onnx, next to its other files. `context_length` is in tokens. `threads` defaults to the cores that
    this process may use, at most 8, and is limited to the available cores. onnxruntime always repacks the weights,
    whatever `repack` is. UsageError when a number is not positive or the context is longer than the base was trained
    for.
    """

    has_sequence: ClassVar[Literal[True]] = True
    BATCH_COST: ClassVar[Mapping[int, float]] = {2: 1.2, 4: 1.6, 8: 2.4, 16: 4.0}
    # For one row, GroupQueryAttention and products of two inputs have kernels of their own.
    EVEN_ROWS: ClassVar[int] = 2
    LOGITS_COST: ClassVar[Mapping[int, float]] = {}
    logits_excess = 0.0
    adjusts_threads = False

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
        check_kv(NAME, kv)
        self.context_length = context_length
        header = read_onnx(path)
        check_operators(header, path)
        config = read_config(path.with_name(CONFIG_NAME))
        check_context_length(context_length, config.trained_context_length)
        self._slots, self._past = slots_of(header), past_inputs(header, config.head_size)
        self._recurrence = recurrence_of(header)
        self.tokenizer = JsonTokenizer(path.parent, config.end_tokens)
        self.threads = threads_for(threads)
        self._session = open_session(path, self.threads)
        self._vocab_size = _vocab_size(self._session, path)
        self._adapters: dict[str, Arrays] = {}
        self._prefixes: dict[str, Arrays] = {}
        self._loaded: Mapping[str, Any] = ChainMap(self._adapters, self._prefixes)
        # Shared with forks: a switch must not come between the steps of unloading.
        self._changed = threading.Lock()
        self._is_fork = False
        self._engines: WeakSet[OnnxEngine] = WeakSet()
        self._new_sequence()

    def fork(self) -> OnnxEngine:
        """Another engine with its own sequence, on the same session and adapters."""
        other = copy(self)
        other._is_fork = True
        other._new_sequence()
        return other

    def _new_sequence(self) -> None:
        """Make the buffers of a sequence, and the bindings that point to them."""
        self._cache = self._new_cache()
        # A number for bases with recurrent layers.
        self.max_rollback = self._cache.max_rollback
        self._mask = np.ones(self.context_length, np.int64)
        self._ids, self._start = np.zeros(CHUNK, np.int64), np.zeros(1, np.int64)
        self._options = run_options()
        self._prefix: str | None = None
        self._begin = 0
        self._bindings: OrderedDict[tuple[tuple[str, float], ...], tuple[_Binding, ...]] = OrderedDict()
        self._binding: tuple[_Binding, ...] = ()
        self._length = 0
        self._last: Logits | None = None
        self._engines.add(self)
        self.activate({})

    def _new_cache(self) -> KvCache:
        if self._recurrence.shapes:
            return HybridCache(self._past, self._recurrence, self.context_length)
        return KvCache(self._past, self.context_length)

    @property
    def signatures(self) -> tuple[str, ...]:
        """The library, its version, and the KV data type."""
        return (f"{self.library_version()}, f32",)

    library_version = staticmethod(library_version)

    @staticmethod
    def examine(path: Path, _sha256: str) -> tuple[list[Path], str | None]:
        """All files of the base at `path`, and the fingerprint of the GGUF file that it was made from."""
        header = read_onnx(path)
        names = (CONFIG_NAME, TOKENIZER_NAME, "tokenizer_config.json", *header.external_files)
        return [path, *(path.parent / name for name in names)], header.metadata.get(BASE_FINGERPRINT)

    def load_adapter(
        self, name: str, path: Path, fingerprint: str | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """See `Engine`; these files do not contain invocation tokens. VerificationError for a damaged file."""
        if name in self._loaded:
            return
        arrays = read_arrays(path, name, fingerprint)
        if any(is_past(slot) for slot in arrays):
            tokens = check_prefix_arrays(arrays, self._past, name)
            check_prefix_fits(name, tokens, self.context_length)
            self._prefixes[name] = {slot: np.asarray(array[0], np.float32) for slot, array in arrays.items()}
            return
        check_arrays(arrays, self._slots, name)
        self._adapters[name] = to_float32(arrays)

    def unload_adapter(self, name: str) -> None:
        """See `Engine`."""
        with self._changed:
            self._adapters.pop(name, None)
            self._prefixes.pop(name, None)
            for engine in list(self._engines):
                engine._forget(name)

    def _forget(self, name: str) -> None:
        """Drop the bindings of an adapter, and the sequence if the adapter is its prefix."""
        for key in [key for key in list(self._bindings) if name in dict(key)]:
            if self._bindings.pop(key, None) is self._binding:
                self._binding = self._binding_of({})
        if self._prefix == name:
            self._prefix = None
            self._rewind()

    def activate(self, adapters: Mapping[str, float]) -> None:
        """See `Engine`."""
        with self._changed:
            check_scales(adapters, self._loaded)
            prefix = prefix_among(adapters, self._prefixes)
            added = {name: scale for name, scale in adapters.items() if name in self._adapters}
            self._binding = self._binding_of(added)
            if prefix != self._prefix:
                self._prefix = prefix
                self._rewind()

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """The number of tokens that fit in the context after the prefix among these adapters, if any."""
        return self.context_length - self._tokens_of(prefix_among(adapters, self._prefixes))

    def truncate(self, keep: int) -> int:
        """See `Engine`."""
        end = self._begin + max(keep, 0)
        # An empty sequence too: Ctrl-C may have left a part of a recurrent state.
        if end < self._length or end == self._begin:
            self._length, self._last = max(self._cache.truncate(end), self._begin), None
        return self._length - self._begin

    def use_threads(self, count: int) -> None:
        """Do nothing: a session has a fixed number of threads, which take over the work of a thread without a core."""

    def end_threads(self) -> None:
        """Do nothing: all callers of a session use its threads."""

    def stop_step(self) -> None:
        """Make the running step of another thread end soon with StepStopped; if none runs, maybe the next one."""
        self._options.terminate = True

    def decode(self, tokens: Sequence[int]) -> Logits:
        """See `Engine`."""
        check_tokens_fit(tokens, self._length, self.context_length, self._vocab_size)
        row = np.empty((1, self._vocab_size), np.float32)
        with self._step(len(tokens)):
            for start in range(0, len(tokens), CHUNK):
                self._run(tokens[start : start + CHUNK], row)
        self._last = row[0]
        self._cache.keep(self._length)
        return self._last

    def decode_all(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """See `Engine`."""
        check_tokens_fit(tokens, self._length, self.context_length, self._vocab_size)
        with self._step(len(tokens)):
            logits = self._run_all(tokens, last)
        self._last = logits[-1].copy()
        return logits

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """See `Engine`."""
        if self._last is None:
            raise UsageError("there are no logits to score continuations with", "decode at least one token first")
        start, last = self._length, self._last
        check_continuations(continuations, start, self.context_length, self._vocab_size)

        try:
            with self._cache.branched(start) as cut:

                def keep(count: int) -> int:
                    self._length = cut(start + count)
                    return self._length - start

                return scores_in_order(continuations, last, keep, self._run_all)
        finally:
            self._length, self._last = start, last

    def save_state(self) -> memoryview:
        """The keys and values of the sequence, for `restore_state` on the same base with the same prefix."""
        return self._cache.save(self._begin, self._length)

    def restore_state(self, state: memoryview) -> None:
        """Replace the sequence by a saved one; decode at least one token before `score`."""
        self.truncate(0)
        self._length = self._cache.restore(state, self._begin)

    def close(self) -> None:
        """Free everything; a second call does nothing, and no other call may follow."""
        if self._session is None:
            return
        if not self._is_fork:
            self.tokenizer.close()
        self._length, self._last = 0, None
        # A binding keeps the session, and with it the mapped weights.
        self._bindings.clear()
        self._binding = ()
        self._adapters, self._prefixes, self._loaded = {}, {}, {}
        self._session = None
        self._cache = KvCache({}, 0)

    def _rewind(self) -> None:
        """Drop the sequence; the keys and values of the active prefix, if any, come before the next one."""
        self._last = None
        self._cache.truncate(0)
        self._begin = self._length = self._tokens_of(self._prefix)
        if self._prefix:
            self._cache.put_prefix(self._prefixes[self._prefix])

    def _tokens_of(self, prefix: str | None) -> int:
        """The length of a prefix in tokens; 0 without one."""
        return next(iter(self._prefixes[prefix].values())).shape[1] if prefix else 0

    def _binding_of(self, adapters: Mapping[str, float]) -> tuple[_Binding, ...]:
        """The bindings of a set of adapters, made on first use and kept in an LRU cache."""
        key = tuple(adapters.items())
        if key not in self._bindings:
            tensors = sum_of_adapters([(self._adapters[name], scale) for name, scale in key])
            with graph_errors():
                self._bindings[key] = tuple(
                    _Binding(self._bind(tensors, side), tensors) for side in range(self._cache.sides)
                )
            if len(self._bindings) > _BINDINGS:
                self._bindings.popitem(last=False)
        self._bindings.move_to_end(key)
        return self._bindings[key]

    def _bind(self, tensors: Arrays, side: int) -> Any:  # noqa: ANN401 - onnxruntime's own
        """A binding of the cache and an adapter's tensors; other adapter slots keep their empty defaults."""
        binding = self._session.io_binding()
        self._cache.bind(binding, side)
        for name, tensor in tensors.items():
            binding.bind_input(name, "cpu", 0, np.float32, tensor.shape, tensor.ctypes.data)
        binding.bind_input("logits_start", "cpu", 0, np.int64, (1,), self._start.ctypes.data)
        return binding

    @contextmanager
    def _step(self, tokens: int) -> Iterator[None]:
        """Undo a step that is stopped: drop the tokens that it appended."""
        length = self._length
        self._cache.begin_step(length, tokens)
        try:
            yield
        except StepStopped:
            self._cache.undo_step(length)
            self._length, self._last = length, None
            raise

    def _run_all(self, tokens: Sequence[int], last: int | None = None) -> Logits:
        """Append tokens; logits after each of the `last` ones, shape [last, vocab]."""
        first = len(tokens) - (len(tokens) if last is None else last)
        logits = np.empty((len(tokens) - first, self._vocab_size), np.float32)
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            rows = logits[max(0, start - first) : max(0, start + len(part) - first)]
            self._run(part, rows if len(rows) else np.empty((1, self._vocab_size), np.float32))
        return logits

    def _run(self, tokens: Sequence[int], out: Logits) -> None:
        """Append tokens; write the logits after the last `len(out)` of them to `out`."""
        count, binding = len(tokens), self._binding[self._cache.side]
        self._last = None
        self._ids[:count] = tokens
        self._start[0] = count - len(out)
        total = self._length + count
        with graph_errors():
            # Binding takes longer than the smallest operators, so bind only what changed.
            if binding.count != count:
                binding.io.bind_input("input_ids", "cpu", 0, np.int64, (1, count), self._ids.ctypes.data)
                self._cache.bind_step(binding.io, count)
                binding.count = count
            binding.io.bind_output("logits", "cpu", 0, np.float32, (1, *out.shape), out.ctypes.data)
            binding.io.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        self._options.terminate = False
        run_binding(self._session, binding.io, self._options)
        self._cache.end_run()
        self._length = total


def _vocab_size(session: Any, path: Path) -> int:  # noqa: ANN401 - an InferenceSession
    size = next((value.shape[-1] for value in session.get_outputs() if value.name == "logits"), None)
    if not isinstance(size, int):
        raise VerificationError(f"{path} has no logits of a known size", "build the bundle again")
    return size


ENGINE = OnnxEngine
"""The class for `Runtime.open(engine="onnx")`."""
