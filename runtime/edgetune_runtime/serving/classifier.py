"""Scores the labels of a prompt with an engine without a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edgetune_runtime.bundle import AdapterEntry
from edgetune_runtime.engines.base import LabelEngine, Logits, log_total
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import Prompt
from edgetune_runtime.threads.priority import ComputeThreads


class Embedding(NamedTuple):
    """The pooled last layer for a text, and the text's number of tokens."""

    vector: list[float]
    tokens: int


class Classifier:
    """An engine without a sequence, computing on `threads` if given, else on the caller's thread. Thread-safe.

    It needs no contexts: an adapter is an argument of a call, so nothing is switched.
    """

    def __init__(self, engine: LabelEngine, threads: ComputeThreads | None) -> None:
        self.engine = engine
        self._threads = threads

    def load(self, entry: AdapterEntry, path: Path, fingerprint: str) -> None:
        """Check the adapter's file, which must have a head for its labels, and load it."""
        self.engine.load_adapter(entry.name, path, fingerprint, len(entry.labels))

    def unload(self, name: str) -> None:
        """Free an adapter that no call uses."""
        self.engine.unload_adapter(name)

    def scores(self, prompt: Prompt, labels: Sequence[str], entry: AdapterEntry, scale: float) -> list[float]:
        """The log probability of each label among all of the adapter's head; UsageError for an unknown label."""
        unknown = [label for label in labels if label not in entry.labels]
        if unknown:
            names = ", ".join(entry.labels)
            raise UsageError(f"adapter {entry.name!r} has no label {unknown[0]!r}", f"choose one of: {names}")
        logits = self._run(partial(self.engine.logits, self.engine.tokens_of(prompt), entry.name, scale))
        total = log_total(logits)
        return [float(logits[entry.labels.index(label)]) - total for label in labels]

    def embedding(self, text: str) -> Embedding:
        """The plain base's pooled last layer for a text."""
        tokens = self.engine.tokens_of(text)
        return Embedding(self._run(partial(self.engine.pooled, tokens)).tolist(), len(tokens))

    def close(self) -> None:
        """Free everything after running calls end; a second call does nothing, others raise UsageError."""
        self.engine.close()
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.close()

    def _run(self, compute: Callable[[], Logits]) -> Logits:
        threads = self._threads
        return compute() if threads is None else threads.run(compute)
