"""The public API: open a bundle once, then call it with the adapters of your choice."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self, Unpack

from edgetune_runtime.bundle import CLASSIFY, GENERATE, Manifest, pinned
from edgetune_runtime.bundle.signatures import read_signed_manifest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.events import Event
from edgetune_runtime.serving.classifier import Embedding
from edgetune_runtime.serving.places import Holder
from edgetune_runtime.states.cache import name_of
from edgetune_runtime.store.in_use import VersionsInUse
from edgetune_runtime.text.chat import Prompt
from edgetune_runtime.tools.definitions import Tools, tool_set
from edgetune_runtime.wording import shortened

from .adapter_changes import AdapterChanges, add_adapter, reload
from .adapter_choice import Adapters
from .answer import Answer, Outcome, Stream
from .classification import Classification, check_labels
from .label_search import LabelScores
from .loaded import LoadedBundle
from .opening import open_base, require_library
from .opening_options import RuntimeOptions, decide
from .options import AnswerForm, AnswerOptions, split_options
from .preflight import require_opens
from .routing.router import Route
from .scoring import NegativeLogLikelihood, window_loss
from .session import Session
from .unsure import AnswerCall, answer_pieces, check_min_confidence, is_below, require_curves

_LOG = logging.getLogger(__name__)


class Runtime(AbstractContextManager["Runtime"]):
    """A bundle that is ready to answer. Use it in a `with` block, or call `close`. Thread-safe."""

    def __init__(self, bundle: Path, loaded: LoadedBundle) -> None:
        self.bundle = bundle
        self._loaded = loaded

    @classmethod
    def open(cls, path: str | Path, **options: Unpack[RuntimeOptions]) -> Self:
        """Open a bundle: check the base's files and map it; see `RuntimeOptions`.

        The files of an adapter are checked and read when it is first used, unless `preload` names it. Raises
        NotFoundError for missing files and unknown adapters, VerificationError for damaged files, IncompatibleError for
        adapters of another base or a missing engine, UsageError for invalid options.
        """
        begin = time.perf_counter()
        bundle = Path(path)
        folder = pinned(bundle)
        in_use = VersionsInUse([folder])
        try:
            manifest = read_signed_manifest(folder, options.get("trusted_keys"))
            decided = decide(manifest, **options)
            require_library(manifest, decided.engine)
            if decided.preflight:
                require_opens(folder, manifest, decided)
            loaded = LoadedBundle(folder, manifest, open_base(folder, manifest, decided), decided, in_use)
        except BaseException:
            in_use.use(())
            raise
        try:
            loaded.preload()
        except BaseException:
            loaded.close()
            raise
        elapsed_s, count = time.perf_counter() - begin, len(manifest.adapters)
        _LOG.info("opened %s with %s and %d adapters in %.2f s", bundle, decided.engine, count, elapsed_s)
        decided.emit(Event("loaded", manifest.name, seconds=elapsed_s))
        return cls(bundle, loaded)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, with the adapters that there are now."""
        return self._loaded.manifest

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
        """Names of the adapters."""
        return list(self.manifest.adapters)

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters | Route = None,
        raw: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Answer:
        """Answer a prompt (a text or chat messages) with one adapter by name, with several {name: scale}, or the base.

        A name alone uses the manifest's scale. The system prompt of the (first) adapter is used unless the messages
        begin with one, and its output constraint unless the options give another; see `AnswerOptions`. With `raw`, the
        prompt is a text that the answer continues, without the chat template and the system prompt.

        With `adapter="auto"` the bundle's router chooses by the last message of the user; see `route`, whose choice can
        be given instead. `Answer.route` has it.

        Raises NotFoundError for an unknown adapter, UsageError for a prompt that does not fit in the context or an
        output constraint that cannot be used, BusyError when too many calls are already waiting.
        """
        return self.stream(prompt, adapter=adapter, raw=raw, **options).read()

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters | Route = None,
        raw: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Like `generate`, but yields the text piece by piece, without tool calls.

        Keeps a context until it ends or is closed. Any thread may read from it, one at a time, and close it; while one
        reads, another one sets `cancel`. A call waits for a free context, but not for streams that its own thread, or
        one that has ended, read last: if for 2 s no other thread reads them, it raises UsageError.
        """
        limits, form, others = split_options(options, ("adapter", "raw"))
        outcome = Outcome()

        def prepare() -> Generator[str, None, None]:
            call = self._loaded.call(prompt, adapter, form=form, raw=raw, check=limits.check)
            return answer_pieces(self._loaded, AnswerCall(call, prompt, form, limits, others), outcome, options)

        return Stream(self._loaded.replaced.pieces(prepare), outcome)

    def route(self, prompt: Prompt, call: str = GENERATE) -> Route:
        """The adapter that `adapter="auto"` means for a prompt in `generate`, or in `classify`. Runs no model.

        Adapters with labels are for `classify`. `generate` chooses among the others, and among those with labels whose
        prompts differ from theirs.

        Raises NotFoundError for a bundle without a router, UsageError for a prompt of no task if the recipe says so.
        """
        return self._loaded.router.route(prompt, call)

    def session(self, adapter: Adapters = None) -> Session:
        """Start a conversation with these adapters; see `Session`."""
        return Session(self._loaded, adapter)

    def load_session(self, path: str | Path) -> Session:
        """Resume a conversation saved by `Session.save`; its state is reused if it matches this bundle and engine.

        Raises NotFoundError when the file or one of its adapters does not exist, VerificationError when the file is
        damaged or not a session, IncompatibleError when it is a session on another base.
        """
        return Session._load(self._loaded, Path(path))

    def classify(
        self,
        prompt: Prompt,
        labels: Sequence[str] | None = None,
        *,
        adapter: Adapters | Route = None,
        exact: bool = False,
        min_confidence: float | None = None,
    ) -> Classification:
        """The most likely of `labels` (default: the adapter's), and probabilities, normalized over these labels.

        Labels are computed token by token, the most probable beginnings first, until no other label can be more likely.
        Those that were not computed have no probability; `Classification.unseen` is the most that they can have. With
        `exact`, all are computed. An encoder has only the labels of its one adapter, and always computes all.

        If the adapter has a label for texts that are out of scope and it is among `labels`, a text gets it too where
        the most likely label and the similarity of the prompt to training prompts are lower than those of the task are.

        With `min_confidence` (default: the recipe's) the label is marked if its confidence is lower, or not known.
        """
        classify = partial(self._classify, prompt, labels, adapter, exact=exact, min_confidence=min_confidence)
        return self._loaded.replaced.prepared(classify)

    def _classify(
        self,
        prompt: Prompt,
        labels: Sequence[str] | None,
        adapter: Adapters | Route,
        *,
        exact: bool,
        min_confidence: float | None,
    ) -> Classification:
        check_min_confidence(min_confidence)
        adapter, route = self._loaded.routed(prompt, adapter, CLASSIFY)
        scales, classifier = self._loaded.scales(adapter), self._loaded.classifier
        if classifier is not None and len(scales) != 1:
            message = f"an encoder classifies with the labels of one adapter, not of {len(scales)}"
            raise UsageError(message, f"choose one of: {', '.join(self.adapters)}")
        first = self.manifest.adapter(next(iter(scales))) if scales else None
        if labels is None:
            labels = first.labels if first is not None else ()
        if not labels and route is not None and not route.is_known:
            message = "the prompt is of none of the tasks, and the base has no labels"
            raise UsageError(message, "name an adapter that has labels, or give labels")
        check_labels(labels)
        form = AnswerForm(labels=labels, exact=exact)
        curves = form.curves_among(self._loaded.curves(scales), first)
        if route is None:
            require_curves(min_confidence, curves)
        if min_confidence is None and curves and first is not None and first.unsure is not None:
            min_confidence = first.unsure.min_confidence

        if classifier is not None:
            assert first is not None
            choice = self._loaded.label_choices.of(labels, first, is_alone=self._loaded.is_alone(scales))
            with self._loaded.adapters.use({first.name: first}, Holder()):
                scores = LabelScores(classifier.scores(prompt, labels, first, scales[first.name]))
                found = choice.likeliest(scores, None, curves)
        else:
            call = self._loaded.call(prompt, adapter, form=form)
            assert call.labels is not None
            with call.lease() as context:
                found = call.labels.of(context, context.run(call.job).logits, curves)
        return replace(found, is_unsure=is_below(found.confidence, min_confidence), route=route)

    def embed(self, text: str) -> Embedding:
        """The plain base's pooled last layer for a text, and its number of tokens.

        UsageError for a text-generation bundle.
        """
        self._loaded.lifetime.check()
        classifier = self._loaded.classifier
        if classifier is None:
            message = f"bundle {self.manifest.name!r} generates text: it has no encoder for embeddings"
            raise UsageError(message, "open a text-classification bundle")
        return classifier.embedding(text)

    def perplexity(self, text: str, *, adapter: Adapters = None) -> float:
        """The perplexity of a text: the exponential of its mean negative log-likelihood per token."""
        return self.negative_log_likelihood(text, adapter=adapter).perplexity

    def negative_log_likelihood(self, text: str, *, adapter: Adapters = None) -> NegativeLogLikelihood:
        """The negative log-likelihood of the text's tokens except the first, to be summed over several texts.

        A text longer than the context is split into windows that overlap by one token. UsageError for less than two
        tokens.
        """
        if not isinstance(text, str):
            raise UsageError(f"the text is {shortened(repr(text))}", "give a string")
        _, adapters = self._loaded.pool(adapter)
        capacity = self._loaded.capacity(adapters)
        with self._loaded.base.tokenizer() as tokenizer:
            tokens = tokenizer.tokenize(text)
        if len(tokens) < 2:
            raise UsageError(f"a text of {len(tokens)} tokens has no perplexity", "give a longer text")
        starts = range(0, len(tokens) - 1, capacity - 1)
        with self._loaded.lease(adapter, tokens[:1]) as (context, adapters):
            total = math.fsum(window_loss(context, adapters, tokens[start : start + capacity]) for start in starts)
        return NegativeLogLikelihood(total, len(tokens) - 1)

    def warm(self, adapters: Sequence[Adapters] | None = None, *, tools: Tools | None = None) -> dict[str, int]:
        """Compute the missing states of the fixed prompts of these adapters (default: the base and each adapter).

        `tools` are part of the prompts, as in the calls that will give them.
        Output constraints of these adapters are compiled too, for which the base's vocabulary is read once; those with
        texts of the prompt are compiled again for each answer.

        Returns the number of tokens of each state by name, without prompts that are too short for a state. UsageError
        for a text-classification bundle.
        """
        if self._loaded.classifier is not None:
            message = f"bundle {self.manifest.name!r} only classifies text: it has no prompts to warm"
            raise UsageError(message, "use classify")
        if isinstance(adapters, str):
            raise UsageError(f"adapters is {adapters!r}", "give a list of them")
        choices = [None, *self.adapters] if adapters is None else adapters
        form = AnswerForm(tools=tool_set(tools))
        tokens = {}
        for choice in choices:
            call = self._loaded.call("?", choice, form=form)
            if call.job.is_worth_a_state:
                begin = time.perf_counter()
                # Saved now, also the state of tools, which come with calls.
                job = replace(call.job, comes_with_call=False, is_warmed=True)
                with call.lease(job) as context:
                    reused = context.run(job).reused
                elapsed_s = time.perf_counter() - begin
                name, count = name_of(self._loaded.scales(choice)), call.job.fixed
                _LOG.info("warmed %s: %d tokens, %d reused, %.0f ms", name, count, reused, elapsed_s * 1e3)
                self._loaded.options.emit(Event("warmed", name, seconds=elapsed_s, tokens=count))
                tokens[name_of(choice)] = count
        return tokens

    def add_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Add an adapter of another bundle on the same base, and load it; returns its name.

        Of the bundle at `path`, which may lack its base, the manifest and the adapter's own files are read, now and
        whenever the adapter is loaded again; `name` is needed if the bundle has several adapters. The files are checked
        as those of a bundle that is opened, also in a child process with `preflight`, while other calls go on. Nothing
        is written: `edgetune-run adapters add` puts an adapter into a bundle.

        Raises UsageError if there is an adapter of this name, IncompatibleError for one of another base, without a file
        for the engine or larger than `adapters_mb`, and what `open` raises for damaged files.
        """
        return add_adapter(self._loaded, Path(path), name)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter with its states, draft table and output constraint, in memory and in the cache folder.

        Calls that run with it end normally, and this one waits for them; later ones, and those that still wait for a
        context, raise NotFoundError. Unsure answers that it was to answer are only marked, with a warning in the log.
        NotFoundError for an unknown name, UsageError, which changes nothing, if only streams that this thread read last
        use it.
        """
        with self._loaded.changing():
            self._loaded.drop(name)
            self._loaded.renew_router()

    def reload(self) -> AdapterChanges:
        """Take over the bundle on disk, which another process may have changed or switched to another version.

        Calls that run with a replaced adapter end normally, and new ones wait for them. The base stays in memory, and
        so do the states of adapters that are the same. New adapters are checked as by `add_adapter`; one that is
        refused leaves what there is. Adapters that were added from other bundles stay, and so do the options of `open`.
        IncompatibleError, which changes nothing, if the base is another one, and the errors of reading a manifest.
        """
        return reload(self._loaded, pinned(self.bundle))

    def clear_cache(self) -> None:
        """Drop all sequences and cached states, except those on disk, so that the next call starts with a cold cache.

        Past answers are forgotten, on disk too; see `learn_drafts`.
        """
        self._loaded.clear()

    def close(self) -> None:
        """Free the base and adapters after the calls of other threads end; a second call does nothing.

        Calls that wait for a context, and all later ones, raise UsageError; so does a stream that this thread, or one
        that has ended, went on with last. A process that was forked meanwhile frees nothing.
        """
        self._loaded.close()

    def __exit__(self, *_error: object) -> None:
        self.close()
