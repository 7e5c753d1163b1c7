"""The public API: open a bundle once, then call it with the adapters of your choice."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from . import engines
from .bundle import read_manifest
from .engines import gguf
from .errors import UsageError
from .events import Event, safely
from .generation import Answer, Generation, Stream, generate
from .loaded import Adapters, LoadedBundle
from .opening import OpeningOptions, file_of, open_base
from .options import AnswerForm, AnswerOptions, split_options
from .preflight import require_opens
from .scoring import most_likely, window_loss
from .serving.jobs import PromptJob
from .session import Session
from .states.cache import name_of
from .states.store import StateStore, default_folder
from .text.chat import Prompt
from .threads.priority import NORMAL
from .tools.definitions import Tools, tool_set

_LOG = logging.getLogger(__name__)

CACHE_MB = 128
DISK_MB = 512
DISK_MB_PER_DAY = 512


class Runtime:
    """A bundle that is ready to answer. Use it in a `with` block, or call `close`. Thread-safe."""

    def __init__(self, loaded: LoadedBundle) -> None:
        self.bundle = loaded.bundle
        self.manifest = loaded.manifest
        self._loaded = loaded

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        engine: str | None = None,
        threads: int | None = None,
        context_length: int | None = None,
        kv: str | None = None,
        repack: bool | None = None,
        verify: bool = True,
        exact: bool = True,
        cache_mb: float = CACHE_MB,
        disk_mb: float = DISK_MB,
        disk_mb_per_day: float = DISK_MB_PER_DAY,
        cache_folder: str | Path | None = None,
        contexts: int | None = None,
        waiting: int = 64,
        priority: str = NORMAL,
        map_large_blocks: bool = False,
        drafts: bool = True,
        merged_mb: float | None = None,
        preflight: bool = True,
        on_event: Callable[[Event], None] | None = None,
    ) -> Self:
        """Open a bundle: check its files, map the base and load the adapters.

        `engine` is gguf or onnx, by default the first format of the bundle. `context_length` (tokens) and `threads`
        default to the manifest's. `kv` is the data type of the KV cache: with gguf f16 or q8_0, which halves the cache
        and every state; with onnx only f32. With `repack`, llama.cpp reads the weights into memory in the layout that
        is fastest on this processor, instead of mapping the file, which processes can share; by default it does so
        where it has code for it (q4_0, q4_K, iq4_nl; not on a Pi 4). onnxruntime always repacks. `verify` compares
        digests before anything is loaded; without it, only the structure of the files is checked.

        A merged adapter is a full model, which is checked and mapped on first use. Up to `merged_mb` of memory is used
        for such models, each with one context; by default what is free. When the next one does not fit, those that no
        call uses are closed, the least recently used first, and opened again by the next call that needs them.

        Up to `cache_mb` of memory (10^6 bytes) is used for states: of each adapter's fixed prompt, of sessions, and the
        last one of each set of adapters, so that switching back does not recompute the prompt. States of fixed prompts
        are also saved in `cache_folder` (default: `store.default_folder`), up to `disk_mb`; 0 saves none. Calls write
        up to `disk_mb_per_day` to it, and with 0 only `warm` does.

        With `exact`, a call gives the same answer, bit for bit, as with a cold cache: it reuses only fixed prompts and
        whole chunks of 128 tokens. Without it, a call reuses all tokens of the common prefix, as a session does with
        its own state; rounding may then decide a near tie between two tokens differently.

        Up to `contexts` calls run at the same time, with whatever adapters, each in its own context, which is created
        when first needed; by default one, and more if they fit in a quarter of the memory that is free beside it, at
        most 4. If there is no memory for one of them after all, a warning is logged, and calls wait for those that
        there are. Up to `waiting` more calls wait; the next one raises BusyError.

        With gguf, fewer threads than `threads` compute while other processes use the cores; this changes no answer.
        `priority` is the priority of the compute threads, on Linux: normal, low (below the threads of normal processes)
        or idle (only on cores that are otherwise idle).

        `map_large_blocks` sets M_MMAP_THRESHOLD of glibc's malloc to 1 MiB for the whole process, unless the variable
        MALLOC_MMAP_THRESHOLD_ is set, so that temporary large blocks do not fragment the heap. Resident memory with
        SmolLM2-135M and eight adapters after 216 answers: 478 MB instead of 509 MB. Without the option, or without
        glibc, malloc is not changed.

        With `drafts`, tokens are drafted from the adapter's draft table and from the prompt, and verified several per
        step (speculative decoding). This changes no answer, except that rounding may decide a near tie differently.

        With `preflight`, a bundle that was not opened before on this machine is first opened in a child process, with
        limits of memory and time and, on Linux, without network: a crash of native code is then a VerificationError.
        That a bundle passed is remembered in `cache_folder`, also with `disk_mb` 0. EDGETUNE_PREFLIGHT=0 in the
        environment turns it off.

        `on_event` is called with each `Event`, on the thread of the call and while it holds its context: it must be
        quick and must not call the runtime. Its errors are logged.

        Raises NotFoundError for missing files, VerificationError for damaged files, IncompatibleError for adapters of
        another base or a missing engine, UsageError for invalid options.
        """
        begin = time.perf_counter()
        bundle = Path(path)
        manifest = read_manifest(bundle)
        trained = manifest.base.trained_context_length
        if context_length is not None and not 2 <= context_length <= trained:
            remedy = f"give 2 to {trained}, the context length that the base was trained for"
            raise UsageError(f"context_length is {context_length}", remedy)
        if merged_mb is not None and not merged_mb >= 0:
            raise UsageError(f"merged_mb is {merged_mb}", "give a number of at least 0")
        if (contexts is not None and contexts < 1) or waiting < 0:
            message = f"contexts is {contexts} and waiting is {waiting}"
            raise UsageError(message, "give contexts of at least 1 and waiting of at least 0")
        engine = engine or next(iter(manifest.base.files), gguf.NAME)
        engines.check_name(engine)
        file = file_of(manifest.base.files, engine, "the base")
        options = OpeningOptions(
            engine=engine,
            make=engines.load(engine, manifest.task),
            context_length=context_length or manifest.context_length,
            threads=manifest.threads if threads is None else threads,
            kv=kv,
            repack=repack,
            verify=verify,
            exact=exact,
            cache_mb=cache_mb,
            store=StateStore(Path(cache_folder or default_folder()), disk_mb, disk_mb_per_day) if disk_mb > 0 else None,
            contexts=contexts,
            waiting=waiting,
            priority=priority,
            map_large_blocks=map_large_blocks,
            drafts=drafts,
            merged_mb=merged_mb,
            emit=safely(on_event),
        )
        if preflight:
            require_opens(bundle, manifest, options, cache_folder)
        loaded = LoadedBundle(bundle, manifest, open_base(bundle, manifest, file, options), options)
        try:
            for entry in manifest.adapters.values():
                loaded.load(entry)
        except BaseException:
            loaded.close()
            raise
        if options.threads is not None and loaded.threads < options.threads:
            _LOG.warning("threads=%d, but only %d cores are available", options.threads, loaded.threads)
        elapsed_s, count = time.perf_counter() - begin, len(manifest.adapters)
        _LOG.info("opened %s with %s and %d adapters in %.2f s", bundle, engine, count, elapsed_s)
        options.emit(Event("loaded", manifest.name, seconds=elapsed_s))
        return cls(loaded)

    @property
    def engine(self) -> str:
        """Name of the engine that runs the bundle."""
        return self._loaded.options.engine

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        return self._loaded.options.context_length

    @property
    def threads(self) -> int:
        """Maximum number of threads of a step."""
        return self._loaded.threads

    @property
    def contexts(self) -> int:
        """Maximum number of calls that run at the same time."""
        return self._loaded.contexts

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return list(self.manifest.adapters)

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        raw: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Answer a prompt (a text or chat messages) with one adapter by name, with several {name: scale}, or the base.

        A name alone uses the manifest's scale. The system prompt of the (first) adapter is used unless the messages
        begin with one, and its output constraint unless the options give another; see `AnswerOptions`. With `raw`, the
        prompt is a text that the answer continues, without the chat template and the system prompt.

        Raises NotFoundError for an unknown adapter, UsageError for a prompt that does not fit in the context or an
        output constraint that cannot be used, BusyError when too many calls are already waiting.
        """
        return self.stream(prompt, adapter=adapter, raw=raw, **options).read()

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        raw: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Like `generate`, but yields the text piece by piece, without tool calls.

        Keeps a context until it ends or is closed. Any thread may go on with it, one at a time. A call waits for a free
        context, but not for streams that its own thread went on with last: if for 2 s no other thread does, it raises
        UsageError.
        """
        limits, form, others = split_options(options)
        call, outcome = self._loaded.call(prompt, adapter, form=form, raw=raw, check=limits.check), Generation()
        return Stream(generate(call, outcome, limits, **others), outcome)

    def session(self, adapter: Adapters = None) -> Session:
        """Start a conversation with these adapters; see `Session`."""
        self._loaded.pool(adapter)
        return Session(self._loaded, adapter)

    def load_session(self, path: str | Path) -> Session:
        """Resume a conversation saved by `Session.save`; its state is reused if it matches this bundle and engine.

        Raises NotFoundError when the file or one of its adapters does not exist, VerificationError when the file is
        damaged or not a session, IncompatibleError when it is a session on another base.
        """
        return Session._load(self._loaded, Path(path))

    def classify(
        self, prompt: Prompt, labels: Sequence[str] | None = None, *, adapter: Adapters = None
    ) -> tuple[str, dict[str, float]]:
        """The most likely of `labels` (default: the adapter's) as the answer, and the probability of each of them.

        All labels are scored in one pass that computes the prompt and the labels' common prefixes once. An encoder has
        only the labels of its one adapter; the probabilities are normalized over the given labels.
        """
        scales, classifier = self._loaded.scales(adapter), self._loaded.classifier
        if classifier is not None and len(scales) != 1:
            message = f"an encoder classifies with the labels of one adapter, not of {len(scales)}"
            raise UsageError(message, f"choose one of: {', '.join(self.adapters)}")
        if labels is None:
            first = next(iter(scales), None)
            labels = self.manifest.adapter(first).labels if first else ()
        if not labels or len(set(labels)) != len(labels) or not all(labels):
            what = f"cannot classify with the labels {list(labels)}" if labels else "there are no labels to choose from"
            raise UsageError(what, "give labels that are unique and not empty, or an adapter that has labels")
        if classifier is not None:
            ((name, scale),) = scales.items()
            return most_likely(labels, classifier.scores(prompt, labels, self.manifest.adapter(name), scale))
        call = self._loaded.call(prompt, adapter)
        with call.pool.lease(call.job) as context:
            tokenizer = context.engine.tokenizer
            endings = [[*tokenizer.tokenize(label, continues=True), tokenizer.end_token] for label in labels]
            context.run(call.job)
            scores = context.score(endings)
        return most_likely(labels, scores)

    def embed(self, text: str) -> tuple[list[float], int]:
        """The plain base's pooled last layer for a text, and its number of tokens.

        UsageError for a text-generation bundle.
        """
        classifier = self._loaded.classifier
        if classifier is None:
            message = f"bundle {self.manifest.name!r} generates text: it has no encoder for embeddings"
            raise UsageError(message, "open a text-classification bundle")
        return classifier.embedding(text)

    def perplexity(self, text: str, *, adapter: Adapters = None) -> tuple[float, int]:
        """Sum of the negative log-likelihoods (nats) of the text's tokens except the first, and their number.

        A text longer than the context is split into windows that overlap by one token.
        """
        pool, adapters = self._loaded.pool(adapter)
        capacity = pool.capacity(adapters)
        with pool.tokenizer() as tokenizer:
            tokens = tokenizer.tokenize(text)
        if len(tokens) < 2:
            raise UsageError(f"a text of {len(tokens)} tokens has no perplexity", "give a longer text")
        starts = range(0, len(tokens) - 1, capacity - 1)
        with pool.lease(PromptJob(tokens[:1], pool.spans(adapters, tokens[:1]))) as context:
            total = math.fsum(window_loss(context, adapters, tokens[start : start + capacity]) for start in starts)
        return total, len(tokens) - 1

    def warm(self, adapters: Sequence[Adapters] | None = None, *, tools: Tools | None = None) -> dict[str, int]:
        """Compute the missing states of the fixed prompts of these adapters (default: the base and each adapter).

        `tools` are part of the prompts, as in the calls that will give them.
        Output constraints of these adapters are compiled too, for which the base's vocabulary is read once.

        Returns the number of tokens of each state by name, without prompts that are too short for a state. UsageError
        for a text-classification bundle.
        """
        if self._loaded.classifier is not None:
            message = f"bundle {self.manifest.name!r} only classifies text: it has no prompts to warm"
            raise UsageError(message, "use classify")
        choices = [None, *self.adapters] if adapters is None else adapters
        form = AnswerForm(tools=tool_set(tools))
        tokens = {}
        for choice in choices:
            call = self._loaded.call("?", choice, form=form)
            if call.job.is_worth_a_state:
                begin = time.perf_counter()
                # The state is wanted at once, also that of tools, which calls bring along.
                job = replace(call.job, is_given=False, is_warmed=True)
                with call.pool.lease(job) as context:
                    reused = context.run(job).reused
                name, count, elapsed_s = _name_of(choice), call.job.fixed, time.perf_counter() - begin
                _LOG.info("warmed %s: %d tokens, %d reused, %.0f ms", name, count, reused, elapsed_s * 1e3)
                self._loaded.options.emit(Event("warmed", name, seconds=elapsed_s, tokens=count))
                tokens[name] = count
        return tokens

    def clear_cache(self) -> None:
        """Drop all sequences and cached states, except those on disk: the next call starts with a cold cache."""
        self._loaded.clear()

    def close(self) -> None:
        """Free the base and adapters after the calls of other threads end; a second call does nothing.

        Calls that wait for a context, and all later ones, raise UsageError; so does a stream that this thread went on
        with last.
        """
        self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name_of(adapter: Adapters) -> str:
    return name_of(adapter or {}) if not isinstance(adapter, str) else adapter
