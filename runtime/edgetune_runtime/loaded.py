"""A loaded bundle: prepares calls and chooses the pool of contexts that runs them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .bundle import AdapterEntry, Manifest, resolve, unchanged, verify_files
from .decoding.constraint import Constraint
from .decoding.drafts import DraftTable, read_table
from .decoding.grammars import Grammars
from .decoding.output import OutputSpec
from .engines.base import Tokenizer
from .errors import IncompatibleError, PromptTooLongError, UsageError, VerificationError
from .events import Event
from .generation import Call, Carried
from .opening import OpeningOptions, file_of, open_base
from .options import AnswerForm
from .serving.classifier import Classifier
from .serving.context import Context
from .serving.jobs import PromptJob
from .serving.pool import Pool
from .states.activation import join_spans
from .states.cache import CALLS, common_prefix
from .text.chat import Message, Prompt, messages_for
from .tools.calls import CallReader
from .tools.definitions import ToolSet
from .tools.grammar import control_tokens, grammar_of, written_form
from .tools.prompts import prompt_text, support_of

_LOG = logging.getLogger(__name__)

Adapters = str | Mapping[str, float] | None

_PROBES = ("A", "7", "\n", "é", "(")
"""Messages without a common prefix: the common prefix of their prompts is the fixed part."""
_MOST_FIXED = 256
"""Fixed parts that are remembered; apps may give other tools with each call."""


class LoadedBundle:
    """The base and adapters of a `Runtime` and its sessions. Thread-safe."""

    def __init__(self, bundle: Path, manifest: Manifest, running: Pool | Classifier, options: OpeningOptions) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.options = options
        self._running = running
        self._process = os.getpid()
        self._merged: dict[str, Pool] = {}
        self._drafts: dict[str, DraftTable] = {}
        self._outputs: dict[str, OutputSpec] = {}
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
        self._fixed_lock = threading.Lock()
        self._fixed: dict[tuple[int, bytes], list[int]] = {}

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
        return self._running.limit if isinstance(self._running, Pool) else 1

    def context(self, adapter: Adapters = None) -> tuple[Context, dict[str, float]]:
        """The context that runs a call with these adapters, and their scales. For measurements, inside `Context.hold`.

        UsageError for a text-classification bundle.
        """
        pool, active = self.pool(adapter)
        return pool.first, active

    def pool(self, adapter: Adapters) -> tuple[Pool, dict[str, float]]:
        """The pool that runs a call with these adapters, and their scales; same errors as `context`."""
        if not isinstance(self._running, Pool):
            message = f"bundle {self.manifest.name!r} only classifies text: it has no generation and no perplexity"
            raise UsageError(message, "use classify")
        scales = self.scales(adapter)
        merged = [name for name in scales if self._is_merged(self.manifest.adapter(name))]
        if not merged:
            return self._running, scales
        if len(scales) > 1 or scales[merged[0]] != 1:
            message = f"adapter {merged[0]!r} is merged, so it cannot be scaled or added to others"
            raise IncompatibleError(message, "use it alone with scale 1")
        return self._merged_pool(self.manifest.adapter(merged[0])), {}

    def call(
        self,
        prompt: Prompt,
        adapter: Adapters,
        *,
        owner: str = CALLS,
        carried: Carried | None = None,
        form: AnswerForm | None = None,
        raw: bool = False,
    ) -> Call:
        """Prepare a call: its tokens, adapters, and the fixed part of its prompt; same errors as `generate`.

        `owner` owns the state that the call reuses and updates. The common prefix of the prompt and `carried` keeps its
        state, and the system prompt of `carried` replaces the adapter's. `form` constrains the answer. A `raw` prompt
        is a text that is not rendered.
        """
        pool, active = self.pool(adapter)
        first = next(iter(self.scales(adapter)), None)
        own = self._system_of(first)
        system = carried.system if carried is not None else own
        form = AnswerForm() if form is None else form
        begin, capacity = time.perf_counter(), pool.first.capacity(active)
        with pool.tokenizer() as tokenizer:
            if raw:
                tokens, fixed, is_given = _raw_tokens(tokenizer, prompt, form, capacity), 0, False
            else:
                messages = messages_for(prompt, system)
                tokens = _checked(_tokens(tokenizer, messages, form), capacity)
                given = _system_in(messages)
                is_given = given != own or form.tools is not None or form.think is not None
                # Other adapters computed the beginning of a session that was carried over.
                is_shared = carried is None or given == own
                fixed = self._fixed_tokens(pool, tokenizer, given, form, tokens) if is_shared else 0
            reader, held = (None, None) if form.tools is None else _calls(tokenizer, form.tools, form.output)
        spans, kept = pool.first.spans(active, tokens), 0
        if carried is not None:
            kept = min(common_prefix(tokens, carried.tokens), len(tokens) - 1)
            spans = join_spans(carried.spans, kept, spans)
        drafts = self._drafts.get(first) if first is not None else None
        output = form.output
        if form.is_adapters and first is not None:
            output = self._outputs.get(first)
        held = held or output
        constraint = None if held is None else self._constraint(held)
        job, prepared_s = PromptJob(tokens, spans, fixed, owner, is_given), time.perf_counter() - begin
        return Call(pool, job, system, prepared_s, kept, drafts, output, constraint, reader)

    def scales(self, adapter: Adapters) -> dict[str, float]:
        """The scale of each chosen adapter; NotFoundError for an unknown one, UsageError for an invalid choice.

        All calls begin here, so UsageError too in a process that was forked since: its parent has the threads.
        """
        if os.getpid() != self._process:
            message = "the bundle was opened before this process was forked"
            raise UsageError(message, "open it after the fork, or start processes by spawn")
        if adapter is None:
            return {}
        if isinstance(adapter, str):
            entry = self.manifest.adapter(adapter)
            # The weights of a merged model include its scale.
            return {adapter: 1.0 if self._is_merged(entry) else entry.scale}
        if not isinstance(adapter, Mapping):
            raise UsageError(f"adapter is {adapter!r}", "give a name, {name: scale}, or None for the base")
        for name, scale in adapter.items():
            self.manifest.adapter(name)
            if not isinstance(scale, int | float) or not math.isfinite(scale):
                raise UsageError(f"adapter {name!r} has scale {scale!r}", "give a finite number")
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
        if self._is_merged(entry):
            return
        file = file_of(entry.files, self.options.engine, f"adapter {entry.name!r}")
        path, fingerprint = resolve(self.bundle, file), self.manifest.base.fingerprint
        with unchanged(self.bundle, [file] if self.options.verify else ()):
            if self.options.verify:
                verify_files(self.bundle, self.manifest, [file])
            self._running.load(entry, path, fingerprint)

    def clear(self) -> None:
        """Drop all sequences and cached states, except those on disk."""
        for pool in self._pools():
            for context in pool.contexts:
                with context.hold():
                    context.clear()

    def drop_states(self, owner: str) -> None:
        """Drop the states of an owner, such as a closed session."""
        for pool in self._pools():
            pool.drop_states(owner)

    def close(self) -> None:
        """Free the base and adapters after the calls of other threads end; a second call does nothing."""
        for running in (self._running, *self._merged.values()):
            running.close()

    def _constraint(self, output: OutputSpec) -> Constraint:
        """A constraint on the base's vocabulary, which merged models share and the first constrained call reads."""
        assert isinstance(self._running, Pool)
        with self._lock:
            if self._grammars is None:
                with self._running.tokenizer() as tokenizer:
                    self._grammars = Grammars(tokenizer)
        return self._grammars.constraint(output)

    def _fixed_tokens(
        self, pool: Pool, tokenizer: Tokenizer, system: str | None, form: AnswerForm, tokens: Sequence[int]
    ) -> int:
        """How many first tokens all prompts with this system prompt and these tools have in common."""
        # A client may send prompts of any length, so only their digests are remembered.
        texts = [system, None if form.tools is None else form.tools.text, form.think]
        key = (id(pool), hashlib.sha256(json.dumps(texts).encode()).digest())
        known = self._fixed.get(key)
        if known is None:
            one, *others = (_tokens(tokenizer, messages_for(probe, system), form) for probe in _PROBES)
            known = one[: min(common_prefix(one, other) for other in others)]
            with self._fixed_lock:
                while len(self._fixed) >= _MOST_FIXED:
                    del self._fixed[next(iter(self._fixed))]
                self._fixed[key] = known
        return len(known) if len(known) < len(tokens) and tokens[: len(known)] == known else 0

    def _system_of(self, first: str | None) -> str | None:
        return self.manifest.adapter(first).system if first is not None else None

    def _is_merged(self, entry: AdapterEntry) -> bool:
        return entry.shapes.get(self.options.engine) == "merged"

    def _merged_pool(self, entry: AdapterEntry) -> Pool:
        with self._lock:
            if entry.name not in self._merged:
                file = file_of(entry.files, self.options.engine, f"adapter {entry.name!r}")
                begin = time.perf_counter()
                made = open_base(self.bundle, self.manifest, file, self.options)
                elapsed_s = time.perf_counter() - begin
                _LOG.info("loaded merged adapter %r in %.2f s", entry.name, elapsed_s)
                self.options.emit(Event("loaded", entry.name, seconds=elapsed_s))
                assert isinstance(made, Pool)
                self._merged[entry.name] = made
            return self._merged[entry.name]

    def _pools(self) -> list[Pool]:
        return [running for running in (self._running, *self._merged.values()) if isinstance(running, Pool)]


def _output_of(entry: AdapterEntry) -> OutputSpec:
    try:
        return OutputSpec.from_json(entry.output or {})
    except UsageError as error:
        message = f"adapter {entry.name!r} has an invalid output: {error.message}"
        raise VerificationError(message, "build the bundle again") from error


def _system_in(messages: Sequence[Message]) -> str | None:
    return messages[0]["content"] if messages[0]["role"] == "system" else None


def _tokens(tokenizer: Tokenizer, messages: Sequence[Message], form: AnswerForm) -> list[int]:
    return tokenizer.tokenize(prompt_text(tokenizer, messages, form.tools, think=form.think))


def _raw_tokens(tokenizer: Tokenizer, prompt: Prompt, form: AnswerForm, capacity: int) -> list[int]:
    if not isinstance(prompt, str) or form.tools is not None:
        what = "messages" if form.tools is None else "tools"
        raise UsageError(f"a raw prompt has no {what}", "give a text, without tools, or leave raw out")
    return _checked(tokenizer.tokenize(prompt), capacity)


def _checked(tokens: list[int], capacity: int) -> list[int]:
    if not 0 < len(tokens) <= capacity:
        message = f"the prompt has {len(tokens)} tokens, the context allows 1 to {capacity}"
        error = PromptTooLongError if tokens else UsageError
        raise error(message, "change the prompt, or open the bundle with a larger context_length")
    return tokens


def _calls(tokenizer: Tokenizer, tools: ToolSet, output: OutputSpec | None) -> tuple[CallReader | None, OutputSpec]:
    """What reads the calls of an answer, and what holds it to them, or to `output` where it has none."""
    template = support_of(tokenizer).format
    controls = control_tokens(template, tokenizer)
    form = written_form(template, controls, tokenizer)
    marks = {token: name.encode() for name, token in controls.items()}
    names = None if output is None else frozenset(tool.name for tool in tools.offered)
    reader = None if tools.choice == "none" else CallReader(form, marks, names)
    return reader, grammar_of(tools, form, controls, output)
