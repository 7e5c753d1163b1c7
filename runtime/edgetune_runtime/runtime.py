"""Bundle in, answers out: the base is loaded once, and each call says which adapters answer it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from .bundle import read_manifest
from .errors import UsageError
from .generation import Answer, Generation, Stream, generate
from .loaded import Adapters, LoadedBundle
from .opening import OpeningOptions, engine_class, file_of, open_base
from .options import AnswerOptions, split_form
from .scoring import label_scores, likeliest, window_loss
from .session import Session
from .states.store import StateStore, default_folder
from .text.chat import Prompt
from .threads.priority import NORMAL

_LOG = logging.getLogger(__name__)

CACHE_MB = 128
DISK_MB = 512


class Runtime:
    """A bundle that is ready to answer. Use it in a `with` block, or call `close`. Safe to use from several threads."""

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
        cache_folder: str | Path | None = None,
        contexts: int | None = None,
        waiting: int = 64,
        priority: str = NORMAL,
        map_large_blocks: bool = False,
        drafts: bool = True,
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
        MALLOC_MMAP_THRESHOLD_ is set, so that large blocks that come and go leave no holes in the heap. Resident
        memory with SmolLM2-135M and eight adapters after 216 answers: 478 MB in place of 509 MB. Without the option,
        and without glibc, malloc is left alone.

        With `drafts`, answers are drafted by what the adapter's training answers have in common, and several tokens are
        verified in one step. The text stays the same unless two tokens are almost equally likely.

        Raises NotFoundError, VerificationError for damaged files, IncompatibleError for adapters of another base or a
        missing engine, UsageError for options that cannot be.
        """
        begin = time.perf_counter()
        bundle = Path(path)
        manifest = read_manifest(bundle)
        longest = manifest.base.context_length
        if context_length is not None and not 2 <= context_length <= longest:
            raise UsageError(f"context_length is {context_length}", f"give 2 to {longest}, as the base was trained")
        if (contexts is not None and contexts < 1) or waiting < 0:
            raise UsageError(f"contexts is {contexts} and waiting {waiting}", "give at least 1 context")
        engine = engine or next(iter(manifest.base.files), "gguf")
        options = OpeningOptions(
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
            drafts=drafts,
        )
        file = file_of(manifest.base.files, engine, "the base")
        loaded = LoadedBundle(bundle, manifest, open_base(bundle, manifest, file, options), options)
        try:
            for entry in manifest.adapters.values():
                loaded.load(entry)
        except BaseException:
            loaded.close()
            raise
        taken_s, count = time.perf_counter() - begin, len(manifest.adapters)
        _LOG.info("opened %s with %s and %d adapters in %.2f s", bundle, engine, count, taken_s)
        return cls(loaded)

    @property
    def engine(self) -> str:
        """Name of the engine that runs the bundle."""
        return self._loaded.options.engine

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return list(self.manifest.adapters)

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Answer a prompt, a text or chat messages, with one adapter by name, several {name: scale} or the base.

        A name alone means the manifest's scale. The (first) adapter's own system prompt is used unless the messages
        bring one, and the answer is held to its form unless the options say otherwise; see `AnswerOptions` for these.

        Raises NotFoundError for an unknown adapter, UsageError for a prompt that does not fit in the context or a form
        that cannot be met, BusyError when too many calls wait already.
        """
        return self.stream(prompt, adapter=adapter, **options).read()

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """As `generate`, but yields the text in pieces as it comes; it holds a context until it ends or is closed."""
        form, is_free, others = split_form(options)
        call, outcome = self._loaded.call(prompt, adapter, form=form, free=is_free), Generation()
        return Stream(generate(call, outcome, **others), outcome)

    def session(self, adapter: Adapters = None) -> Session:
        """A conversation that begins with these adapters; see `Session`."""
        self._loaded.pool(adapter)
        return Session(self._loaded, adapter)

    def load_session(self, path: str | Path) -> Session:
        """Go on with a conversation that `Session.save` wrote; its state is taken up if it fits this bundle and engine.

        Raises NotFoundError when there is no such file, VerificationError when it is damaged or none, IncompatibleError
        for one of another base, NotFoundError for an adapter that the bundle lacks.
        """
        return Session._load(self._loaded, Path(path))

    def classify(
        self, prompt: Prompt, labels: Sequence[str] | None = None, *, adapter: Adapters = None
    ) -> tuple[str, dict[str, float]]:
        """The likeliest of `labels` (default: the adapter's) as the answer, and the probability of each among them.

        All labels are scored in one pass that computes the prompt and their shared beginnings once. An encoder knows
        the labels of one adapter alone, and shares the probability out among those of them that are given.
        """
        scales, encoder = self._loaded.scales(adapter), self._loaded.encoder
        if encoder is not None and len(scales) != 1:
            message = f"an encoder classifies with the labels of one adapter, not of {len(scales)}"
            raise UsageError(message, f"choose one of: {', '.join(self.adapters)}")
        if labels is None:
            first = next(iter(scales), None)
            labels = self.manifest.adapter(first).labels if first else ()
        if not labels or len(set(labels)) != len(labels) or not all(labels):
            raise UsageError(f"cannot classify among {list(labels)}", "give labels, none of them empty or twice")
        if encoder is not None:
            return likeliest(labels, label_scores(encoder, self.manifest, prompt, labels, scales))
        call = self._loaded.call(prompt, adapter)
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
        context, adapters = self._loaded.context(adapter)
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
            call = self._loaded.call("?", choice)
            if call.job.is_worth_a_state:
                begin = time.perf_counter()
                with call.pool.lease(call.job) as context:
                    reused = context.run(call.job).reused
                count, taken_ms = call.job.fixed, (time.perf_counter() - begin) * 1e3
                _LOG.info("warmed %s: %d tokens, %d reused, %.0f ms", _name_of(choice), count, reused, taken_ms)
                tokens[_name_of(choice)] = call.job.fixed
        return tokens

    def clear_cache(self) -> None:
        """Forget all prompts and answers but what is on the disk: the next call computes, or loads, everything."""
        self._loaded.clear()

    def close(self) -> None:
        """Free base and adapters once other threads' calls have ended; a second call does nothing."""
        self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name_of(adapter: Adapters) -> str:
    if adapter is None or isinstance(adapter, str):
        return adapter or "base"
    return " ".join(f"{name}={scale:g}" for name, scale in adapter.items())
