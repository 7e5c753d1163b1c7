"""Bundle in, answers out: the base is loaded once, and each call says which adapters answer it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .bundle import AdapterEntry, Manifest, read_manifest, resolve, verify_files
from .engines.base import Tokenizer
from .errors import IncompatibleError, UsageError
from .generation import Answer, Call, Carried, Outcome, Stream, generate
from .opening import Options, engine_class, file_of, open_base
from .scoring import label_scores, likeliest, window_loss
from .serving.context import Context, Job
from .serving.pool import Pool
from .session import Adapters, Session
from .states.activation import behind
from .states.cache import CALLS, common_prefix
from .states.store import StateStore, default_folder
from .text.chat import Prompt, messages_for, render
from .text.sampling import Sampling
from .threads.priority import NORMAL

if TYPE_CHECKING:
    from .engines.onnx.encoder import EncoderEngine

CACHE_MB = 128
DISK_MB = 512

_PROBES = ("A", "7", "\n", "é", "(")
"""Messages that have no beginning in common: what their prompts share is fixed."""


class Runtime:
    """A bundle that is ready to answer. Use it in a `with` block, or call `close`. Safe to use from several threads."""

    def __init__(self, bundle: Path, manifest: Manifest, running: Pool | EncoderEngine, options: Options) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self._running = running
        self._merged: dict[str, Pool] = {}
        self._lock = threading.Lock()
        self._fixed: dict[tuple[int, str | None], list[int]] = {}
        self._options = options

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
        cache_folder: str | Path | None = None,
        contexts: int | None = None,
        waiting: int = 64,
        priority: str = NORMAL,
        map_large_blocks: bool = False,
    ) -> Self:
        """Open a bundle: check its files, map the base and load the adapters.

        `engine` is gguf or onnx, by default the first format of the bundle.
        `context_length` (tokens) and `threads` default to the manifest's. `kv` is how keys and values are kept: with
        gguf f16 or q8_0, which halves them and every state; with onnx f32 alone. `repack` has llama.cpp read the
        weights into memory in the order that the processor computes fastest with, in place of mapping the file, which
        processes share; by default where it has code for that (q4_0, q4_K, iq4_nl; not on a Pi 4). onnxruntime always
        does. `verify` compares digests before anything is loaded; without it only the files' structure is checked. A
        merged adapter is a whole model, which is checked and mapped when it is first used.

        Up to `cache_mb` of memory (10^6 bytes) keep states: of each adapter's fixed prompt, of sessions, and the last
        of each set of adapters, so that switching back does not compute the prompt again. States of fixed prompts are
        kept in `cache_folder` too (default: that of `store.default_folder`), up to `disk_mb`; 0 keeps none.

        With `exact` a call's answer is, bit for bit, what it would be if nothing were known: it takes up fixed prompts
        and whole chunks of 128 tokens. Without, it takes up every token that it shares with the last one, as a session
        does with its own; where two tokens are all but equally likely, rounding may then choose the other.

        Up to `contexts` calls run side by side, each with a context of its own, made when it is first needed; by
        default as many as a quarter of the free memory holds, at most 4. At most `waiting` more wait; the next is a
        BusyError.

        While other processes take the cores, with gguf fewer threads compute than `threads`, which changes no answer.
        `priority` is that of the threads that compute: normal, low (behind all normal processes' threads) or idle (only
        on cores that nobody else wants), on Linux.

        `map_large_blocks` sets M_MMAP_THRESHOLD of glibc's malloc to 1 MiB for the whole process, unless the variable
        MALLOC_MMAP_THRESHOLD_ is set, so that states that come and go leave no holes in the heap: 40 MB with eight
        adapters. Without the option, and without glibc, malloc is left alone.

        Raises NotFoundError, VerificationError for damaged files, IncompatibleError for adapters of another base or a
        missing engine, UsageError for options that cannot be.
        """
        bundle = Path(path)
        manifest = read_manifest(bundle)
        longest = manifest.base.context_length
        if context_length is not None and not 2 <= context_length <= longest:
            raise UsageError(f"context_length is {context_length}", f"give 2 to {longest}, as the base was trained")
        if (contexts is not None and contexts < 1) or waiting < 0:
            raise UsageError(f"contexts is {contexts} and waiting {waiting}", "give at least 1 context")
        engine = engine or next(iter(manifest.base.files), "gguf")
        options = Options(
            engine=engine,
            make=engine_class(engine, manifest.task),
            context_length=context_length or manifest.context_length,
            threads=manifest.threads if threads is None else threads,
            kv=kv,
            repack=repack,
            verify=verify,
            exact=exact,
            cache_mb=cache_mb,
            store=StateStore(Path(cache_folder or default_folder()), disk_mb) if disk_mb > 0 else None,
            contexts=contexts,
            waiting=waiting,
            priority=priority,
            map_large_blocks=map_large_blocks,
        )
        file = file_of(manifest.base.files, engine, "the base")
        runtime = cls(bundle, manifest, open_base(bundle, manifest, file, options), options)
        try:
            for entry in manifest.adapters.values():
                runtime._load(entry)
        except BaseException:
            runtime.close()
            raise
        return runtime

    @property
    def engine(self) -> str:
        """Name of the engine that runs the bundle."""
        return self._options.engine

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return list(self.manifest.adapters)

    @property
    def encoder(self) -> EncoderEngine | None:
        """What runs a text-classification bundle; None for one that generates."""
        return None if isinstance(self._running, Pool) else self._running

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        sampling: Sampling | None = None,
        deadline_s: float | None = None,
        cancel: threading.Event | None = None,
        **overrides: object,
    ) -> Answer:
        """Answer a prompt, a text or chat messages, with one adapter by name, several {name: scale} or the base.

        A name alone means the manifest's scale. The (first) adapter's own system prompt is used unless the messages
        bring one. After `deadline_s` seconds, or once `cancel` is set, the answer ends with what there is, waiting for
        other calls included. `overrides` change single fields of `sampling`, such as `temperature=0.7`.

        Raises NotFoundError for an unknown adapter, UsageError for a prompt that does not fit in the context, BusyError
        when too many calls wait already.
        """
        limits: dict[str, Any] = {"deadline_s": deadline_s, "cancel": cancel, **overrides}
        return self.stream(prompt, adapter=adapter, sampling=sampling, **limits).read()

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        sampling: Sampling | None = None,
        deadline_s: float | None = None,
        cancel: threading.Event | None = None,
        **overrides: object,
    ) -> Stream:
        """As `generate`, but yields the text in pieces as it comes; it holds a context until it ends or is closed."""
        call, outcome = self.call(prompt, adapter), Outcome()
        pieces = generate(call, outcome, sampling=sampling, deadline_s=deadline_s, cancel=cancel, **overrides)
        return Stream(pieces, outcome)

    def session(self, adapter: Adapters = None) -> Session:
        """A conversation that begins with these adapters; see `Session`."""
        self.pool(adapter)
        return Session(self, adapter)

    def load_session(self, path: str | Path) -> Session:
        """Go on with a conversation that `Session.save` wrote; its state is taken up if it fits this bundle and engine.

        Raises NotFoundError when there is no such file, VerificationError when it is damaged or none, IncompatibleError
        for one of another base, NotFoundError for an adapter that the bundle lacks.
        """
        return Session.load(self, Path(path))

    def classify(
        self, prompt: Prompt, labels: Sequence[str] | None = None, *, adapter: Adapters = None
    ) -> tuple[str, dict[str, float]]:
        """The likeliest of `labels` (default: the adapter's) as the answer, and the probability of each among them.

        All labels are scored in one pass that computes the prompt and their shared beginnings once. An encoder knows
        the labels of one adapter alone, and shares the probability out among those of them that are given.
        """
        scales = self.scales(adapter)
        if self.encoder is not None and len(scales) != 1:
            message = f"an encoder classifies with the labels of one adapter, not of {len(scales)}"
            raise UsageError(message, f"choose one of: {', '.join(self.adapters)}")
        if labels is None:
            first = next(iter(scales), None)
            labels = self.manifest.adapter(first).labels if first else ()
        if not labels or len(set(labels)) != len(labels) or not all(labels):
            raise UsageError(f"cannot classify among {list(labels)}", "give labels, none of them empty or twice")
        if self.encoder is not None:
            return likeliest(labels, label_scores(self.encoder, self.manifest, prompt, labels, scales))
        call = self.call(prompt, adapter)
        with call.pool.lease(call.job) as context:
            tokenizer = context.engine.tokenizer
            endings = [[*tokenizer.tokenize(label, continues=True), tokenizer.end_token] for label in labels]
            context.run(call.job)
            scores = context.score(endings)
        return likeliest(labels, scores)

    def perplexity(self, text: str, *, adapter: Adapters = None) -> tuple[float, int]:
        """Sum of the negative log likelihoods (nats) of the text's tokens but the first, and how many were counted.

        A text longer than the context is taken in windows that overlap by one token.
        """
        context, adapters = self.context(adapter)
        with context.hold():
            window = context.capacity(adapters)
            tokens = context.engine.tokenizer.tokenize(text)
            if len(tokens) < 2:
                raise UsageError(f"a text of {len(tokens)} tokens has no perplexity", "give a longer text")
            starts = range(0, len(tokens) - 1, window - 1)
            total = math.fsum(window_loss(context, adapters, tokens[start : start + window]) for start in starts)
        return total, len(tokens) - 1

    def warm(self, adapters: Sequence[Adapters] | None = None) -> dict[str, int]:
        """Make the states of the fixed prompts of these adapters (default: of the base and each one), where they lack.

        Returns how many tokens each state has, by name; one that is too short to be worth a state is left out.
        """
        choices = [None, *self.adapters] if adapters is None else adapters
        tokens = {}
        for choice in choices:
            call = self.call("?", choice)
            if call.job.is_worth_a_state:
                with call.pool.lease(call.job) as context:
                    context.run(call.job)
                tokens[_name_of(choice)] = call.job.fixed
        return tokens

    def clear_cache(self) -> None:
        """Forget all prompts and answers but what is on the disk: the next call computes, or loads, everything."""
        for pool in self._pools():
            for context in pool.contexts:
                with context.hold():
                    context.clear()

    def forget(self, owner: str) -> None:
        """Forget the states of an owner, such as a session that has ended."""
        for pool in self._pools():
            pool.forget(owner)

    def close(self) -> None:
        """Free base and adapters once other threads' calls have ended; a second call does nothing."""
        for running in (self._running, *self._merged.values()):
            running.close()

    def context(self, adapter: Adapters = None) -> tuple[Context, dict[str, float]]:
        """Where a call with these adapters runs, and what is active there: for measurements, inside `Context.hold`.

        UsageError for a text-classification bundle, which generates nothing.
        """
        pool, active = self.pool(adapter)
        return pool.first, active

    def call(
        self,
        prompt: Prompt,
        adapter: Adapters,
        *,
        owner: str = CALLS,
        carried: Carried | None = None,
    ) -> Call:
        """Make a call ready: tokens, adapters, and the fixed part of the prompt; errors as those of `generate`.

        `owner` is whose state is taken up and left. What is `carried` stands as far as the prompt begins with it, its
        system prompt in place of the adapter's.
        """
        pool, active = self.pool(adapter)
        first = next(iter(self.scales(adapter)), None)
        system = carried.system if carried is not None else self._system_of(first)
        begin = time.perf_counter()
        with pool.tokenizer() as tokenizer:
            tokens = _tokens(tokenizer, prompt, system)
            fixed = self._fixed_part(pool, tokenizer, first, system)
        prepared_s = time.perf_counter() - begin
        longest = pool.first.capacity(active)
        if not 0 < len(tokens) <= longest:
            message = f"the prompt has {len(tokens)} tokens, the context holds 1 to {longest}"
            raise UsageError(message, "change the prompt, or open the bundle with a longer context")
        count = len(fixed) if len(fixed) < len(tokens) and tokens[: len(fixed)] == fixed else 0
        spans, kept = pool.first.spans(active, tokens), 0
        if carried is not None:
            kept = min(common_prefix(tokens, carried.tokens), len(tokens) - 1)
            spans = behind(carried.spans, kept, spans)
        return Call(pool, Job(tokens, spans, count, owner), system, prepared_s, kept)

    def scales(self, adapter: Adapters) -> dict[str, float]:
        """What a choice of adapters means; NotFoundError for an unknown one, UsageError for what is no choice."""
        if adapter is None:
            return {}
        if isinstance(adapter, str):
            return {adapter: self.manifest.adapter(adapter).scale}
        if not isinstance(adapter, Mapping):
            raise UsageError(f"adapter is {adapter!r}", "give a name, {name: scale}, or None for the base")
        for name, scale in adapter.items():
            self.manifest.adapter(name)
            if not isinstance(scale, int | float) or not math.isfinite(scale):
                raise UsageError(f"adapter {name!r} has scale {scale!r}", "give a finite number")
        return {name: float(scale) for name, scale in adapter.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fixed_part(self, pool: Pool, tokenizer: Tokenizer, first: str | None, system: str | None) -> list[int]:
        """The tokens that all prompts with the adapter's own system prompt begin with, whatever the message."""
        if system != self._system_of(first):
            return []
        place = (id(pool), first)
        if place not in self._fixed:
            one, *others = (_tokens(tokenizer, probe, system) for probe in _PROBES)
            self._fixed[place] = one[: min(common_prefix(one, other) for other in others)]
        return self._fixed[place]

    def _system_of(self, first: str | None) -> str | None:
        return self.manifest.adapter(first).system if first is not None else None

    def pool(self, adapter: Adapters) -> tuple[Pool, dict[str, float]]:
        """The contexts that a call with these adapters runs in, and what is active there; errors as of `context`."""
        if not isinstance(self._running, Pool):
            message = f"bundle {self.manifest.name!r} classifies text: its encoder writes none and has no perplexity"
            raise UsageError(message, "use classify")
        scales = self.scales(adapter)
        merged = [name for name in scales if self._is_merged(self.manifest.adapter(name))]
        if not merged:
            return self._running, scales
        if len(scales) > 1 or scales[merged[0]] != 1:
            message = f"adapter {merged[0]!r} is merged, so it cannot be scaled or added to others"
            raise IncompatibleError(message, "use it alone with scale 1")
        return self._merged_pool(self.manifest.adapter(merged[0])), {}

    def _load(self, entry: AdapterEntry) -> None:
        """Check one adapter and load it beside the base; a merged one waits until it is used."""
        if self._is_merged(entry):
            return
        file = file_of(entry.files, self._options.engine, f"adapter {entry.name!r}")
        if self._options.verify:
            verify_files(self.bundle, self.manifest, [file])
        path, fingerprint = resolve(self.bundle, file), self.manifest.base.fingerprint
        if isinstance(self._running, Pool):
            self._running.first.engine.load_adapter(entry.name, path, fingerprint, entry.invocation)
        else:
            self._running.load_adapter(entry.name, path, fingerprint, len(entry.labels))

    def _is_merged(self, entry: AdapterEntry) -> bool:
        return entry.shapes.get(self._options.engine) == "merged"

    def _merged_pool(self, entry: AdapterEntry) -> Pool:
        with self._lock:
            if entry.name not in self._merged:
                file = file_of(entry.files, self._options.engine, f"adapter {entry.name!r}")
                made = open_base(self.bundle, self.manifest, file, self._options)
                assert isinstance(made, Pool)
                self._merged[entry.name] = made
            return self._merged[entry.name]

    def _pools(self) -> list[Pool]:
        return [running for running in (self._running, *self._merged.values()) if isinstance(running, Pool)]


def _tokens(tokenizer: Tokenizer, prompt: Prompt, system: str | None) -> list[int]:
    messages, bos, eos = messages_for(prompt, system), tokenizer.bos, tokenizer.eos
    return tokenizer.tokenize(render(tokenizer.chat_template, messages, add_generation_prompt=True, bos=bos, eos=eos))


def _name_of(adapter: Adapters) -> str:
    if adapter is None or isinstance(adapter, str):
        return adapter or "base"
    return " ".join(f"{name}={scale:g}" for name, scale in adapter.items())
