"""A loaded bundle: prepares calls and chooses the pool of contexts that runs them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgetune_runtime.bundle import AdapterEntry, Manifest, resolve, unchanged, verify_files
from edgetune_runtime.decoding.drafts import EMPTY, DraftTable, read_table
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.decoding.past_answers import PastAnswers, path_of
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.events import Event
from edgetune_runtime.limits import Stopped, no_limits
from edgetune_runtime.serving.classifier import Classifier
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.jobs import PromptJob
from edgetune_runtime.serving.merged import MakeRoom, MergedModels, MergedPool
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.states.activation import join_spans
from edgetune_runtime.states.cache import CALLS, common_prefix
from edgetune_runtime.states.store import default_folder
from edgetune_runtime.text.chat import Message, Prompt, messages_for
from edgetune_runtime.wording import CLOSED

from .generation import Call, CarriedState
from .opening import open_merged
from .opening_options import DISK, OFF, OpeningOptions, file_of
from .options import AnswerForm
from .preparing import Constraints, FixedParts, chat_tokens, raw_tokens

_LOG = logging.getLogger(__name__)

Adapters = str | Mapping[str, float] | None
"""An adapter by name, adapters with their scales, or None for the plain base."""

_LARGEST_SCALE = 1000
"""Engines compute in float32, and far larger scales would give no numbers."""


class LoadedBundle:
    """The base and adapters of a `Runtime` and its sessions. Thread-safe."""

    def __init__(self, bundle: Path, manifest: Manifest, running: Pool | Classifier, options: OpeningOptions) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.options = options
        self._running = running
        self._process = os.getpid()
        self._merged = MergedModels(self._open_merged, options.merged_mb)
        self._merged_pools: dict[str, MergedPool] = {}
        self._drafts: dict[str, DraftTable] = {}
        self._outputs: dict[str, OutputSpec] = {}
        self._constraints = Constraints()
        self._is_closed = False
        self._fixed = FixedParts()
        self._past = self._past_answers()

    @property
    def classifier(self) -> Classifier | None:
        """The classifier of a text-classification bundle; None for a text-generation bundle."""
        return None if isinstance(self._running, Pool) else self._running

    @property
    def threads(self) -> int:
        """Maximum number of threads of a step."""
        running = self._running.first if isinstance(self._running, Pool) else self._running
        return running.engine.threads

    @property
    def contexts(self) -> int:
        """Maximum number of calls that run at the same time."""
        # Those of a classifier need no context, and share the threads of one session.
        return self._running.places.limit if isinstance(self._running, Pool) else 1

    def context(self, adapter: Adapters = None) -> tuple[Context, dict[str, float]]:
        """The context that runs a call with these adapters, and their scales. For measurements, inside `Context.hold`.

        UsageError for a text-classification bundle.
        """
        pool, active = self.pool(adapter)
        return pool.first, active

    def pool(self, adapter: Adapters) -> tuple[Pool | MergedPool, dict[str, float]]:
        """The pool that runs a call with these adapters, and their scales; same errors as `context`."""
        if not isinstance(self._running, Pool):
            message = f"bundle {self.manifest.name!r} only classifies text: it has no generation and no perplexity"
            raise UsageError(message, "use classify")
        scales = self.scales(adapter)
        merged = [name for name in scales if self.manifest.adapter(name).is_merged(self.options.engine)]
        if not merged:
            return self._running, scales
        if len(scales) > 1 or scales[merged[0]] != 1:
            message = f"adapter {merged[0]!r} is merged, so it cannot be scaled or added to others"
            raise IncompatibleError(message, "use it alone with scale 1")
        return self._merged_pools[merged[0]], {}

    def call(
        self,
        prompt: Prompt,
        adapter: Adapters,
        *,
        owner: str = CALLS,
        carried: CarriedState | None = None,
        form: AnswerForm | None = None,
        raw: bool = False,
        check: Callable[[], None] = no_limits,
    ) -> Call:
        """Prepare a call: its tokens, adapters, and the fixed part of its prompt; same errors as `generate`.

        `owner` owns the state that the call reuses and updates. The common prefix of the prompt and `carried` keeps its
        state, and the system prompt of `carried` replaces the adapter's. `form` constrains the answer. A `raw` prompt
        is a text that is not rendered. Where `check` raises Stopped meanwhile, the call does nothing but say so.
        """
        begin, (pool, active) = time.perf_counter(), self.pool(adapter)
        first = next(iter(self.scales(adapter)), None)
        own = self._system_of(first)
        system = carried.system if carried is not None else own
        form = AnswerForm() if form is None else form
        output = self._outputs.get(first) if form.uses_adapter_output and first is not None else form.output
        try:
            with pool.tokenizer() as tokenizer:
                if raw:
                    tokens, fixed, comes_with_call = (
                        raw_tokens(tokenizer, prompt, form, pool.capacity(active)),
                        0,
                        False,
                    )
                else:
                    messages = messages_for(prompt, system)
                    tokens = chat_tokens(tokenizer, messages, form, check, pool.capacity(active))
                    system_text = _system_in(messages)
                    comes_with_call = system_text != own or form.tools is not None or form.think is not None
                    # Other adapters computed the beginning of a session that was carried over.
                    is_shared = carried is None or system_text == own
                    fixed = 0
                    if is_shared:
                        fixed = self._fixed.count(tokenizer, id(pool), system_text, form, tokens=tokens, check=check)
                # Merged models have the base's vocabulary.
                reader, constraint = self._constraints.of(tokenizer, output, form.tools, check)
        except Stopped as stopped:
            job, prepared_s = PromptJob((), ()), time.perf_counter() - begin
            return Call(pool, job, system, prepared_s, output=output, stopped=stopped.reason)
        spans, kept = pool.spans(active, tokens), 0
        if carried is not None:
            kept = min(common_prefix(tokens, carried.tokens), len(tokens) - 1)
            spans = join_spans(carried.spans, kept, spans)
        drafts = self._drafts.get(first) if first is not None else None
        past = self._past.of((first, spans), tokens) if self._past is not None else None
        if past is not None:
            drafts = drafts or EMPTY
        job, prepared_s = PromptJob(tokens, spans, fixed, owner, comes_with_call), time.perf_counter() - begin
        return Call(pool, job, system, prepared_s, kept, drafts, output, constraint, reader, past)

    def scales(self, adapter: Adapters) -> dict[str, float]:
        """The scale of each chosen adapter; NotFoundError for an unknown one, UsageError for an invalid choice.

        All calls begin here, so UsageError too after `close`, and in a process that was forked since: its parent has
        the threads.
        """
        self._check_open()
        if os.getpid() != self._process:
            message = "the bundle was opened before this process was forked"
            raise UsageError(message, "open it after the fork, or start processes by spawn")
        if adapter is None:
            return {}
        if isinstance(adapter, str):
            entry = self.manifest.adapter(adapter)
            # The weights of a merged model include its scale.
            return {adapter: 1.0 if entry.is_merged(self.options.engine) else entry.scale}
        if not isinstance(adapter, Mapping):
            raise UsageError(f"adapter is {adapter!r}", "give a name, {name: scale}, or None for the base")
        for name, scale in adapter.items():
            self.manifest.adapter(name)
            if not isinstance(scale, int | float) or not abs(scale) <= _LARGEST_SCALE:
                remedy = f"give a number from -{_LARGEST_SCALE} to {_LARGEST_SCALE}"
                raise UsageError(f"adapter {name!r} has scale {scale!r}", remedy)
        return {name: float(scale) for name, scale in adapter.items()}

    def load(self, entry: AdapterEntry) -> None:
        """Check an adapter and load it; a merged one is loaded on first use."""
        if entry.output is not None:
            self._outputs[entry.name] = _output_of(entry)
        if self.options.drafts and entry.draft is not None:
            if self.options.verify:
                verify_files(self.bundle, self.manifest, [entry.draft])
            path = resolve(self.bundle, entry.draft)
            self._drafts[entry.name] = read_table(path, self.manifest.base.tokenizer_sha256)
        if entry.is_merged(self.options.engine):
            if isinstance(self._running, Pool):
                self._merged_pools[entry.name] = MergedPool(entry.name, self._running, self._merged)
            return
        file = file_of(entry.files, self.options.engine, f"adapter {entry.name!r}")
        path, fingerprint = resolve(self.bundle, file), self.manifest.base.fingerprint
        with unchanged(self.bundle, [file] if self.options.verify else ()):
            if self.options.verify:
                verify_files(self.bundle, self.manifest, [file])
            self._running.load(entry, path, fingerprint)

    def clear(self) -> None:
        """Drop all sequences and cached states, except those on disk, and all past answers."""
        self._check_open()
        if self._past is not None:
            self._past.clear()
        with self._pools() as pools:
            for pool in pools:
                pool.clear()

    def drop_states(self, owner: str) -> None:
        """Drop the states of an owner, such as a closed session."""
        with self._pools() as pools:
            for pool in pools:
                pool.drop_states(owner)

    def close(self) -> None:
        """Free the base and adapters after the calls of other threads end; a second call does nothing."""
        self._is_closed = True
        if isinstance(self._running, Pool):
            self._running.places.close()
        self._merged.close()
        self._running.close()
        if self._past is not None:
            self._past.save()
        if isinstance(self._running, Pool):
            shared = self._running.first.shared
            shared.cache.clear()
            if shared.threads is not None:
                shared.threads.close()

    def _past_answers(self) -> PastAnswers | None:
        learns, path = self.options.learn_drafts, None
        if learns == OFF or not isinstance(self._running, Pool):
            return None
        if learns == DISK:
            folder = Path(self.options.cache_folder or default_folder())
            path = path_of(folder, self.manifest.name, self.manifest.base.fingerprint)
        with self._running.tokenizer() as tokenizer:
            return PastAnswers(tokenizer.vocab_size, path)

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError(*CLOSED)

    def _system_of(self, first: str | None) -> str | None:
        return self.manifest.adapter(first).system if first is not None else None

    def _open_merged(self, name: str, make_room: MakeRoom) -> Pool:
        entry = self.manifest.adapter(name)
        file = file_of(entry.files, self.options.engine, f"adapter {name!r}")
        begin = time.perf_counter()
        assert isinstance(self._running, Pool)
        base = self._running.first.shared
        pool = open_merged(self.bundle, self.manifest, file, self.options, base=base, make_room=make_room)
        with self._running.tokenizer() as tokenizer:
            if _described(pool.first.engine.tokenizer) != _described(tokenizer):
                pool.close()
                message = f"merged adapter {name!r} has another vocabulary or chat template than the base"
                raise IncompatibleError(message, "build the bundle again")
        elapsed_s = time.perf_counter() - begin
        _LOG.info("loaded merged adapter %r in %.2f s", name, elapsed_s)
        self.options.emit(Event("loaded", name, seconds=elapsed_s))
        return pool

    @contextmanager
    def _pools(self) -> Iterator[list[Pool]]:
        """The pools of all models that are open."""
        with self._merged.use_opened() as models:
            yield [*([self._running] if isinstance(self._running, Pool) else []), *models.values()]


def _output_of(entry: AdapterEntry) -> OutputSpec:
    try:
        return OutputSpec.from_json(entry.output or {})
    except UsageError as error:
        message = f"adapter {entry.name!r} has an invalid output: {error.message}"
        raise VerificationError(message, "build the bundle again") from error


def _described(tokenizer: Tokenizer) -> tuple[object, ...]:
    return tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.chat_template


def _system_in(messages: Sequence[Message]) -> str | None:
    return messages[0]["content"] if messages[0]["role"] == "system" else None
