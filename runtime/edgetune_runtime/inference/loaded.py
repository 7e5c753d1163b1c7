"""A loaded bundle: prepares calls and chooses the pool of contexts that runs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgetune_runtime.bundle import AUTO, GENERATE, AdapterEntry, Manifest, NewAdapter, files_of, without_adapter
from edgetune_runtime.decoding.prompt_texts import texts_of
from edgetune_runtime.errors import IncompatibleError, UsageError
from edgetune_runtime.limits import Stopped, no_limits
from edgetune_runtime.serving.adapters import LoadedAdapters, MergedPool
from edgetune_runtime.serving.classifier import Classifier
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.jobs import PromptJob
from edgetune_runtime.serving.places import Holder
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.states.activation import join_spans
from edgetune_runtime.states.cache import CALLS, common_prefix
from edgetune_runtime.store.in_use import VersionsInUse
from edgetune_runtime.text.chat import Prompt, messages_for

from .adapter_choice import Adapters, capacity_of, names_of, require_one_prefix, scales_of
from .adapter_files import AdapterFiles
from .adapter_loading import BundleAdapterLoader, MergedModelLoader
from .call import Call, CarriedState
from .classification import LabelChoices
from .confidence import Curves
from .lifetime import Lifetime, never_free_in_forks
from .opening import past_answers
from .opening_options import ALL, OpeningOptions
from .options import AnswerForm
from .preparing import Constraints, FixedParts, TokenizedPrompt, raw_tokens
from .replaced_adapters import ReplacedAdapters
from .routing.router import Route, Router


class LoadedBundle:
    """The base and adapters of a `Runtime` and its sessions, with the files in `folder`. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        running: Pool | Classifier,
        options: OpeningOptions,
        in_use: VersionsInUse,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.options = options
        self.files = AdapterFiles(folder, lambda: self.manifest, options)
        self._in_use = in_use
        self.lifetime = Lifetime()
        never_free_in_forks(self)
        self._changing = threading.Lock()
        self._running = running
        self._loader = BundleAdapterLoader(running, self.files, lambda: self.manifest, options, lambda: self.contexts)
        self.adapters = LoadedAdapters(self._loader, lambda: self.manifest.adapters, options.adapters_mb)
        self._models = MergedModelLoader(running, self.files, lambda: self.manifest, options)
        self._merged = LoadedAdapters(self._models, lambda: self.manifest.adapters, options.merged_mb, is_soft=True)
        self._constraints = Constraints()
        self.router = Router(folder, manifest, verify=options.verify)
        self.replaced = ReplacedAdapters()
        self.deferring: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while a bigger model answers, so that the call gives back its context."""
        self._fixed = FixedParts()
        self.label_choices = LabelChoices(running, options.engine, self.files.training_prompts_of)
        self._past = past_answers(manifest, running, options, lambda: self.manifest.adapters)

    @property
    def classifier(self) -> Classifier | None:
        """The classifier of a text-classification bundle; None for a text-generation bundle."""
        return None if isinstance(self._running, Pool) else self._running

    @property
    def base(self) -> Pool:
        """The contexts on the base; UsageError for a text-classification bundle."""
        if not isinstance(self._running, Pool):
            message = f"bundle {self.manifest.name!r} only classifies text: it has no generation and no perplexity"
            raise UsageError(message, "use classify")
        return self._running

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

        The adapters are loaded, and stay so until others need their memory. UsageError for a text-classification
        bundle.
        """
        pool, active = self.pool(adapter)
        with self.adapters.use(self._entries(active), Holder()):
            return pool.first, active

    def pool(self, adapter: Adapters) -> tuple[Pool | MergedPool, dict[str, float]]:
        """The pool that runs a call with these adapters, and their scales; same errors as `context`."""
        return self._pool_of(self.scales(adapter))

    def _pool_of(self, scales: dict[str, float]) -> tuple[Pool | MergedPool, dict[str, float]]:
        base = self.base
        merged = next((each for each in self._entries(scales).values() if each.is_merged(self.options.engine)), None)
        if merged is None:
            return base, scales
        if len(scales) > 1 or scales[merged.name] != 1:
            message = f"adapter {merged.name!r} is merged, so it cannot be scaled or added to others"
            raise IncompatibleError(message, "use it alone with scale 1")
        return MergedPool(merged, base.places, self._merged, self._models.pools), {}

    def call(
        self,
        prompt: Prompt,
        adapter: Adapters | Route,
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
        begin = time.perf_counter()
        adapter, route = self.routed(prompt, adapter, raw=raw)
        form = AnswerForm() if form is None else form
        call = Call(self.base, PromptJob((), ()), None, 0.0, self.adapters, {}, output=form.output, route=route)
        try:
            scales = self.scales(adapter, check)
            carried = self.still_there(carried, check)
            # First: where an adapter is replaced meanwhile, its entry is not the current one, and the call is refused.
            entries = self._entries(scales)
            if entries:
                # Adapters answer as they were trained, without the option.
                form = replace(form, think=None)
            pool, active = self._pool_of(scales)
            first = next(iter(entries.values()), None)
            own_system = None if first is None else first.system
            system = carried.system if carried is not None else own_system
            labels = () if raw else form.labels_of(first)
            output = form.output
            if first is not None and form.is_of_adapter and not labels:
                output = self.files.output_of(first)
            call = replace(call, pool=pool, system=system, entries=entries, output=output)
            capacity = self.capacity(active)
            messages = [] if raw else messages_for(prompt, system)
            with self.base.tokenizer() as tokenizer:
                vocabulary = tokenizer.vocab_size
                if raw:
                    prepared = TokenizedPrompt(raw_tokens(tokenizer, prompt, form, capacity))
                else:
                    prepared = self._fixed.tokenized(
                        tokenizer,
                        messages,
                        form,
                        own_system=own_system,
                        is_carried=carried is not None,
                        max_tokens=capacity,
                        check=check,
                    )
                # Merged models have the base's vocabulary.
                texts = texts_of(messages or messages_for(prompt, None))
                reader, constraint = self._constraints.of(tokenizer, output, form.tools, texts, check)
        except Stopped as stopped:
            return replace(call, stopped=stopped.reason, prepared_s=time.perf_counter() - begin)
        tokens = prepared.tokens
        own = self.base.first.spans(active, tokens)
        spans, kept = own, 0
        if carried is not None:
            kept = min(common_prefix(tokens, carried.tokens), len(tokens) - 1)
            spans = join_spans(carried.spans, kept, own)
            self.require_one_prefix(names for _, names in spans)
            entries = entries | self._entries(carried.adapters - entries.keys())
        has_own_state = system == own_system and all(names in dict(own).values() for _, names in spans)
        is_alone = has_own_state and self.is_alone(scales)
        return replace(
            call,
            job=PromptJob(tokens, spans, prepared.fixed, owner, prepared.comes_with_call),
            entries=entries,
            carried=kept,
            drafts=None if first is None or first.draft is None else partial(self.files.draft_of, first, vocabulary),
            constraint=constraint,
            reader=reader,
            past=None if self._past is None else self._past.of(entries, spans, tokens),
            curves=form.curves_among(self.curves(scales), first) if has_own_state and not raw else {},
            answers_tool=not raw and messages[-1]["role"] == "tool",
            labels=self.label_choices.of(labels, first, is_alone=is_alone, exact=form.exact) if labels else None,
            prepared_s=time.perf_counter() - begin,
        )

    @contextmanager
    def lease(self, adapter: Adapters, tokens: Sequence[int]) -> Iterator[tuple[Context, dict[str, float]]]:
        """Lease a context for tokens that belong to no call, with these adapters loaded, and their scales."""
        scales = self.scales(adapter)
        entries = self._entries(scales)
        pool, active = self._pool_of(scales)
        with self.adapters.lease(pool, PromptJob(tokens, self.base.first.spans(active, tokens)), entries) as context:
            yield context, active

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """The number of tokens that fit in a context with these adapters, prompt and answer together.

        Loads none of them; errors as those of `capacity_of`.
        """
        return capacity_of(self.options.context_length, adapters, self.manifest, self.options.engine)

    def still_there(self, carried: CarriedState | None, check: Callable[[], None] = no_limits) -> CarriedState | None:
        """A state to carry over, when none of its adapters is being replaced; None if one of them was removed."""
        names = set() if carried is None else carried.adapters
        self.replaced.wait(names, check)
        return carried if names <= self.manifest.adapters.keys() else None

    def require_one_prefix(self, spans: Iterable[Mapping[str, float]]) -> None:
        """Raise IncompatibleError if not all adapters of a sequence's spans have the same prefix, or none."""
        require_one_prefix(spans, self.manifest, self.options.engine)

    def is_routed(self, adapter: Adapters, call: str = GENERATE) -> bool:
        """Whether the router chooses the adapter of each prompt; NotFoundError without a router for such calls."""
        if adapter != AUTO or AUTO in self.manifest.adapters:
            return False
        self.router.check(call)
        return True

    def routed(
        self, prompt: Prompt, adapter: Adapters | Route, call: str = GENERATE, *, raw: bool = False
    ) -> tuple[Adapters, Route | None]:
        """The adapters that answer a prompt, and how the router chose if they are `auto`; errors of `Router.route`."""
        if isinstance(adapter, Route):
            return adapter.adapter, adapter
        if not self.is_routed(adapter, call):
            return adapter, None
        if raw:
            raise UsageError("a raw prompt has no message to choose an adapter by", "name one, or leave raw out")
        route = self.router.route(prompt, call)
        return route.adapter, route

    def scales(self, adapter: Adapters, check: Callable[[], None] = no_limits) -> dict[str, float]:
        """The scale of each chosen adapter, when none of them is being replaced; errors as those of `scales_of`.

        Calls with adapters begin here, so it also raises what `Lifetime.check` does, and what `check` does.
        """
        self.lifetime.check()
        self.replaced.wait(names_of(adapter), check)
        return scales_of(adapter, self.manifest, self.options.engine)

    def curves(self, scales: Mapping[str, float]) -> Curves:
        """What gives the confidence of one adapter's answers with its own scale; empty for other choices."""
        if not self.is_alone(scales):
            return {}
        return self.manifest.adapter(next(iter(scales))).confidence.get(self.options.engine, {})

    def is_alone(self, scales: Mapping[str, float]) -> bool:
        """Whether these are one adapter with its own scale."""
        name = next(iter(scales), None)
        return len(scales) == 1 and scales == scales_of(name, self.manifest, self.options.engine)

    def preload(self) -> None:
        """Load the adapters that the options name, and keep them in memory."""
        adapters = self.manifest.adapters
        names = list(adapters) if self.options.preload == ALL else self.options.preload
        self.adapters.pin({name: adapters[name] for name in names})

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A block that changes which adapters there are; others wait for its end. UsageError as of a call."""
        # A forked process may wait forever for a lock that its parent held.
        self.lifetime.check()
        with self._changing:
            self.lifetime.check()
            yield

    def require_room(self, new: NewAdapter) -> None:
        """Raise IncompatibleError for an adapter that exceeds `adapters_mb` beside those that are preloaded."""
        manifest = replace(self.manifest, files=new.files)
        self.adapters.require_room({new.entry.name: self._loader.bytes_of(new.entry, manifest)})

    def add(self, new: NewAdapter) -> None:
        """Add an adapter, in a block of `changing`."""
        entry, files = new.entry, new.files
        self.files.put(entry.name, new.folder)
        if isinstance(self._running, Pool):
            self._running.first.shared.know_adapter(entry.name, self.files.digest_of(new), entry.invocation)
        adapters = {**self.manifest.adapters, entry.name: entry}
        self.manifest = replace(self.manifest, adapters=adapters, files={**self.manifest.files, **files})

    def drop(self, name: str) -> None:
        """Remove an adapter and all that is known of it, once running calls do not use it, in a block of `changing`.

        Other calls get NotFoundError from now on. UsageError, and the adapter stays, if only streams of this thread use
        it. The router stays until `renew_router` or `move`.
        """
        before = self.manifest
        others = without_adapter(before, name)
        # Running calls may still read the adapter's files.
        self.manifest = replace(others, files=before.files)
        try:
            self.adapters.remove(name)
        except UsageError:
            self.manifest = before
            raise
        self._merged.remove(name)
        if isinstance(self._running, Pool):
            self._running.drop_adapter(name)
        self.files.forget(name)
        if self._past is not None:
            self._past.forget(name)
        self.manifest = others

    def renew_router(self) -> None:
        """Choose from now on as the manifest says."""
        self.router = Router(self.folder, self.manifest, verify=self.options.verify)

    def move(self, folder: Path, manifest: Manifest, refused: Collection[str]) -> None:
        """Read all else from the bundle in `folder`, whose adapters are there already, in a block of `changing`.

        Those that were `refused` stay as they are, with their files.
        """
        before = self.manifest
        for name in manifest.adapters.keys() - before.adapters.keys():
            manifest = without_adapter(manifest, name)
        self.files.move(folder, [name for name in manifest.adapters if name not in refused])
        kept = {file: before.files[file] for entry in before.adapters.values() for file in files_of(before, entry)}
        self.folder = folder
        self.manifest = replace(manifest, adapters=before.adapters, files={**manifest.files, **kept})
        self._in_use.use({folder, *map(self.files.folder_of, self.manifest.adapters)})
        self.renew_router()

    def load(self, entry: AdapterEntry) -> None:
        """Load an adapter ahead of the calls that use it, and keep it if the options say so.

        A merged one is loaded by the first call.
        """
        if self.options.preload == ALL or entry.name in self.options.preload:
            self.adapters.pin({entry.name: entry})
        else:
            with self.adapters.use({entry.name: entry}, Holder()):
                pass

    def clear(self) -> None:
        """Drop all sequences and cached states, except those on disk, and all past answers."""
        self.lifetime.check()
        if self._past is not None:
            self._past.clear()
        with self._pools() as pools:
            for pool in pools:
                pool.clear()

    def drop_states(self, owner: str) -> None:
        """Drop the states of an owner, such as a closed session; those of a parent process stay."""
        if self.lifetime.is_of_parent:
            return
        with self._pools() as pools:
            for pool in pools:
                pool.drop_states(owner)

    def close(self) -> None:
        """Free the base and adapters after the calls of other threads end; a second call does nothing.

        In a process that was forked meanwhile, it frees nothing.
        """
        self.lifetime.is_closed = True
        if self.lifetime.is_of_parent:
            return
        self.adapters.close()
        with self._changing:
            self._close()

    def _close(self) -> None:
        if isinstance(self._running, Pool):
            self._running.places.close()
        self._merged.close()
        self._models.close()
        self._running.close()
        self._in_use.use(())
        if self._past is not None:
            self._past.save()
        if isinstance(self._running, Pool):
            shared = self._running.first.shared
            shared.cache.clear()
            if shared.threads is not None:
                shared.threads.close()

    def _entries(self, names: Iterable[str]) -> dict[str, AdapterEntry]:
        return {name: self.manifest.adapter(name) for name in names}

    @contextmanager
    def _pools(self) -> Iterator[list[Pool]]:
        """The pools of all models that are open."""
        with self._merged.use_loaded() as names:
            merged = [self._models.pools[name] for name in names]
            yield [*([self._running] if isinstance(self._running, Pool) else []), *merged]
