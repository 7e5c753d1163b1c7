"""Bundle in, answers out: the base is loaded once, and each call says which adapters answer it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np

from . import engines
from .bundle import CLASSIFICATION, AdapterEntry, Manifest, read_manifest, resolve, verify_files
from .cache import StateCache
from .chat import Message, messages_for, render
from .engines._base import EngineClass, Logits
from .engines._encoder import EncoderEngine
from .errors import IncompatibleError, UsageError, VerificationError
from .generation import Answer, Call, Outcome, Stream, generate
from .sampling import Sampling
from .session import Session

Prompt = str | Sequence[Message]
Adapters = str | Mapping[str, float] | None

_ROWS = 64
"""Rows of logits looked at in one go; a vocabulary of 150,000 takes 0.6 MB a row."""


class _Options(TypedDict):
    engine: str
    make: EngineClass | type[EncoderEngine]
    context_length: int
    threads: int | None
    verify: bool
    cache_mb: float


class Runtime:
    """A bundle that is ready to answer. Use it in a `with` block, or call `close`. Safe to use from several threads."""

    def __init__(self, bundle: Path, manifest: Manifest, running: Session | EncoderEngine, options: _Options) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self._running = running
        self._merged: dict[str, Session] = {}
        self._merged_lock = Lock()
        self._options = options

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        engine: str | None = None,
        threads: int | None = None,
        context_length: int | None = None,
        verify: bool = True,
        cache_mb: float = 64,
    ) -> Self:
        """Open a bundle: check its files, map the base and load the adapters.

        `engine` is gguf or onnx, by default the first format of the bundle.
        `context_length` (tokens) and `threads` default to the manifest's. `verify` compares digests before anything is
        loaded; without it only the files' structure is checked. Up to `cache_mb` of memory keep the last state of each
        set of adapters, so that switching back does not compute the prompt again. A merged adapter is a whole model,
        which is checked and mapped when it is first used.

        Raises NotFoundError, VerificationError for damaged files, IncompatibleError for adapters of another base or a
        missing engine, UsageError for options that cannot be.
        """
        bundle = Path(path)
        manifest = read_manifest(bundle)
        longest = manifest.base.context_length
        if context_length is not None and not 2 <= context_length <= longest:
            raise UsageError(f"context_length is {context_length}", f"give 2 to {longest}, as the base was trained")
        engine = engine or next(iter(manifest.base.files), "gguf")
        options: _Options = {
            "engine": engine,
            "make": EncoderEngine if manifest.task == CLASSIFICATION else _engine(engine),
            "context_length": context_length or manifest.context_length,
            "threads": manifest.threads if threads is None else threads,
            "verify": verify,
            "cache_mb": cache_mb,
        }
        file = _file_of(manifest.base.files, engine, "the base")
        runtime = cls(bundle, manifest, _open(bundle, manifest, file, options), options)
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
        return self._options["engine"]

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return list(self.manifest.adapters)

    @property
    def encoder(self) -> EncoderEngine | None:
        """What runs a text-classification bundle; None for one that generates."""
        return self._running if isinstance(self._running, EncoderEngine) else None

    def generate(
        self, prompt: Prompt, *, adapter: Adapters = None, sampling: Sampling | None = None, **overrides: object
    ) -> Answer:
        """Answer a prompt, a text or chat messages, with one adapter by name, several {name: scale} or the base.

        A name alone means the manifest's scale. The (first) adapter's own system prompt is used unless the messages
        bring one. `overrides` change single fields of `sampling`, such as `temperature=0.7`.

        Raises NotFoundError for an unknown adapter, UsageError for a prompt that does not fit in the context.
        """
        outcome = Outcome()
        for _ in generate(self._call(prompt, adapter), _sampling(sampling, overrides), outcome):
            pass
        assert outcome.answer is not None
        return outcome.answer

    def stream(
        self, prompt: Prompt, *, adapter: Adapters = None, sampling: Sampling | None = None, **overrides: object
    ) -> Stream:
        """As `generate`, but yields the text in pieces as it comes. Other calls wait until that ends or is closed."""
        outcome = Outcome()
        return Stream(generate(self._call(prompt, adapter), _sampling(sampling, overrides), outcome), outcome)

    def classify(
        self, prompt: Prompt, labels: Sequence[str] | None = None, *, adapter: Adapters = None
    ) -> tuple[str, dict[str, float]]:
        """The likeliest of `labels` (default: the adapter's) as the answer, and the probability of each among them.

        All labels are scored in one pass that computes the prompt and their shared beginnings once. An encoder knows
        the labels of one adapter alone, and shares the probability out among those of them that are given.
        """
        scales = self._scales(adapter)
        if self.encoder is not None and len(scales) != 1:
            message = f"an encoder classifies with the labels of one adapter, not of {len(scales)}"
            raise UsageError(message, f"choose one of: {', '.join(self.adapters)}")
        if labels is None:
            first = next(iter(scales), None)
            labels = self.manifest.adapter(first).labels if first else ()
        if not labels or len(set(labels)) != len(labels) or not all(labels):
            raise UsageError(f"cannot classify among {list(labels)}", "give labels, none of them empty or twice")
        if self.encoder is not None:
            return _likeliest(labels, _label_scores(self.encoder, self.manifest, prompt, labels, scales))
        call = self._call(prompt, adapter)
        tokenizer = call.session.engine.tokenizer
        with call.session.hold():
            endings = [[*tokenizer.tokenize(label, continues=True), tokenizer.end_token] for label in labels]
            call.session.start(call.adapters, call.tokens)
            scores = call.session.engine.score(endings)
        return _likeliest(labels, scores)

    def perplexity(self, text: str, *, adapter: Adapters = None) -> tuple[float, int]:
        """Sum of the negative log likelihoods (nats) of the text's tokens but the first, and how many were counted.

        A text longer than the context is taken in windows that overlap by one token.
        """
        session, adapters = self.session(adapter)
        with session.hold():
            window = session.capacity(adapters)
            tokens = session.engine.tokenizer.tokenize(text)
            if len(tokens) < 2:
                raise UsageError(f"a text of {len(tokens)} tokens has no perplexity", "give a longer text")
            starts = range(0, len(tokens) - 1, window - 1)
            total = math.fsum(_window_loss(session, adapters, tokens[start : start + window]) for start in starts)
        return total, len(tokens) - 1

    def clear_cache(self) -> None:
        """Forget all prompts and answers: the next call computes everything."""
        for session in self._sessions():
            with session.hold():
                session.clear()

    def close(self) -> None:
        """Free base and adapters once other threads' calls have ended; a second call does nothing."""
        for running in (self._running, *self._merged.values()):
            running.close()

    def session(self, adapter: Adapters = None) -> tuple[Session, dict[str, float]]:
        """Where a call with these adapters runs, and what is active there: for measurements, inside `Session.hold`.

        UsageError for a text-classification bundle, which generates nothing.
        """
        if isinstance(self._running, EncoderEngine):
            message = f"bundle {self.manifest.name!r} classifies text: its encoder writes none and has no perplexity"
            raise UsageError(message, "use classify")
        scales = self._scales(adapter)
        merged = [name for name in scales if self._is_merged(self.manifest.adapter(name))]
        if not merged:
            return self._running, scales
        if len(scales) > 1 or scales[merged[0]] != 1:
            message = f"adapter {merged[0]!r} is merged, so it cannot be scaled or added to others"
            raise IncompatibleError(message, "use it alone with scale 1")
        return self._merged_session(self.manifest.adapter(merged[0])), {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, prompt: Prompt, adapter: Adapters) -> Call:
        session, active = self.session(adapter)
        first = next(iter(self._scales(adapter)), None)
        messages = messages_for(prompt, self.manifest.adapter(first).system if first else None)
        tokenizer = session.engine.tokenizer
        # Held, so that no other thread frees the vocabulary meanwhile.
        with session.hold():
            begin = time.perf_counter()
            template, bos, eos = tokenizer.chat_template, tokenizer.bos, tokenizer.eos
            tokens = tokenizer.tokenize(render(template, messages, add_generation_prompt=True, bos=bos, eos=eos))
            prepared_s = time.perf_counter() - begin
            longest = session.capacity(active)
        if not 0 < len(tokens) <= longest:
            message = f"the prompt has {len(tokens)} tokens, the context holds 1 to {longest}"
            raise UsageError(message, "change the prompt, or open the bundle with a longer context")
        return Call(session, active, tokens, prepared_s)

    def _scales(self, adapter: Adapters) -> dict[str, float]:
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

    def _load(self, entry: AdapterEntry) -> None:
        """Check one adapter and load it beside the base; a merged one waits until it is used."""
        if self._is_merged(entry):
            return
        file = _file_of(entry.files, self._options["engine"], f"adapter {entry.name!r}")
        if self._options["verify"]:
            verify_files(self.bundle, self.manifest, [file])
        path, fingerprint = resolve(self.bundle, file), self.manifest.base.fingerprint
        if isinstance(self._running, EncoderEngine):
            self._running.load_adapter(entry.name, path, fingerprint, len(entry.labels))
        else:
            self._running.engine.load_adapter(entry.name, path, fingerprint, entry.invocation)

    def _is_merged(self, entry: AdapterEntry) -> bool:
        return entry.shapes.get(self._options["engine"]) == "merged"

    def _merged_session(self, entry: AdapterEntry) -> Session:
        with self._merged_lock:
            if entry.name not in self._merged:
                file = _file_of(entry.files, self._options["engine"], f"adapter {entry.name!r}")
                made = _open(self.bundle, self.manifest, file, self._options)
                assert isinstance(made, Session)
                self._merged[entry.name] = made
            return self._merged[entry.name]

    def _sessions(self) -> list[Session]:
        return [running for running in (self._running, *self._merged.values()) if isinstance(running, Session)]


def _likeliest(labels: Sequence[str], scores: Sequence[float]) -> tuple[str, dict[str, float]]:
    """The label with the highest score (a log probability, up to a constant), and the probability of each."""
    weights = np.exp(np.asarray(scores, np.float64) - max(scores))
    probabilities = dict(zip(labels, (weights / weights.sum()).tolist(), strict=True))
    return max(probabilities, key=probabilities.__getitem__), probabilities


def _label_scores(
    encoder: EncoderEngine, manifest: Manifest, prompt: Prompt, labels: Sequence[str], scales: Mapping[str, float]
) -> list[float]:
    """The logit of each label from the head of the one adapter in `scales`."""
    name, scale = next(iter(scales.items()))
    known = manifest.adapter(name).labels
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise UsageError(f"adapter {name!r} has no label {unknown[0]!r}", f"choose among: {', '.join(known)}")
    logits = encoder.logits(encoder.tokens_of(prompt), name, scale)
    return [float(logits[known.index(label)]) for label in labels]


def _sampling(sampling: Sampling | None, overrides: Mapping[str, Any]) -> Sampling:
    try:
        return replace(sampling or Sampling(), **overrides)
    except TypeError as error:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise UsageError(f"sampling has no {sorted(overrides)}: {error}", f"choose among: {known}") from error


def _open(bundle: Path, manifest: Manifest, file: str, options: _Options) -> Session | EncoderEngine:
    make, path, sha256 = options["make"], resolve(bundle, file), manifest.files[file].sha256
    if options["verify"]:
        # The file itself first: which others belong to it is read from it.
        verify_files(bundle, manifest, [file])
        root = bundle.resolve()
        verify_files(bundle, manifest, [part.relative_to(root).as_posix() for part in make.parts(path)[1:]])
    is_base = file == manifest.base.files[options["engine"]]
    if is_base and not make.is_base(path, manifest.base.fingerprint, sha256):
        raise VerificationError(f"{file} is not the base that the adapters were made for", "build the bundle again")
    # The manifest's figure is for the 2 bytes a number of GGUF.
    kv_bytes = manifest.base.kv_bytes_per_token // 2 * make.bytes_per_number
    _check_memory(kv_bytes * options["context_length"] / 1e6, options["context_length"])
    running = make(path, context_length=options["context_length"], threads=options["threads"])
    if isinstance(running, EncoderEngine):
        return running
    invocations = {name: entry.invocation for name, entry in manifest.adapters.items() if entry.invocation}
    return Session(running, sha256, StateCache(options["cache_mb"]), kv_bytes, invocations)


def _check_memory(needed_mb: float, context_length: int) -> None:
    """IncompatibleError when the context alone is more than the free memory: Linux would kill the process instead."""
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    free_mb = next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("MemAvailable")), None)
    if free_mb is not None and needed_mb > free_mb:
        message = f"a context of {context_length} tokens takes {needed_mb:.0f} MB, and {free_mb:.0f} MB are free"
        raise IncompatibleError(message, "open the bundle with a shorter context")


def _engine(name: str) -> EngineClass:
    known = [module.name for module in iter_modules(engines.__path__) if not module.name.startswith("_")]
    if name not in known:
        raise UsageError(f"no engine {name!r}", f"choose one of: {', '.join(known)}")
    made: EngineClass = import_module(f"{engines.__name__}.{name}").ENGINE
    return made


def _file_of(files: Mapping[str, str], engine: str, what: str) -> str:
    if engine not in files:
        message = f"{what} has no file for engine {engine!r}"
        raise IncompatibleError(message, f"use one of: {', '.join(files) or 'none'}")
    return files[engine]


def _window_loss(session: Session, adapters: Mapping[str, float], tokens: Sequence[int]) -> float:
    loss, begin = 0.0, 1
    for rows in session.walk(adapters, tokens, _ROWS):
        targets = tokens[begin : begin + len(rows)]
        loss += _loss(rows[: len(targets)], targets)
        begin += len(rows)
    return loss


def _loss(rows: Logits, targets: Sequence[int]) -> float:
    """Sum of the negative log likelihoods of `targets`, one for each row of logits."""
    chosen = rows[np.arange(len(targets)), list(targets)].astype(np.float64)
    top = rows.max(axis=1).astype(np.float64)
    totals = top + np.log(np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1, dtype=np.float64))
    return float((totals - chosen).sum())
