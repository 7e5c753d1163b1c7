"""Chooses the adapter of a prompt as a bundle's manifest says, with the classifier in its file."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.bundle import AUTO, BASE, ERROR, Manifest, RouterEntry, resolve, verify_files
from edgetune_runtime.errors import NotFoundError, UsageError
from edgetune_runtime.text.chat import Message, Prompt, messages_for

from .classifier import PromptClassifier, probabilities, read_classifiers


@dataclass(frozen=True)
class Route:
    """The adapter that a router chose for a prompt (None: the base), and the probability of the likeliest task.

    `is_known`: the prompt is of the adapter's task. Otherwise it is of none, and the recipe says what answers.
    """

    adapter: str | None
    confidence: float
    is_known: bool


class Router:
    """The router of a bundle, whose file is read for the first prompt. Thread-safe."""

    def __init__(self, bundle: Path, manifest: Manifest, *, verify: bool) -> None:
        self._bundle, self._manifest, self._verify = bundle, manifest, verify
        self._lock = threading.Lock()
        self._classifiers: Mapping[str, PromptClassifier] | None = None

    def route(self, prompt: Prompt, call: str) -> Route:
        """Choose for the last message of the user.

        NotFoundError for a bundle without a router for this kind of call, VerificationError for a damaged file,
        UsageError for a prompt of no task if such prompts have no answer, and for what `messages_for` refuses.
        """
        entry = self.check(call)
        routed, text = entry.calls[call], last_user_text(messages_for(prompt, None))
        chances = probabilities(self._read(entry)[call].log_odds(text))
        best = int(chances.argmax())
        name, confidence = routed.adapters[best], float(chances[best])
        if confidence >= routed.threshold:
            return Route(name, confidence, is_known=True)
        if entry.below == ERROR:
            raise UsageError(
                f"the prompt is of none of the tasks: {name!r} is the likeliest, with {confidence:.0%}",
                f"name an adapter: {', '.join(self._manifest.adapters)}",
            )
        return Route(None if entry.below == BASE else entry.below, confidence, is_known=False)

    def check(self, call: str) -> RouterEntry:
        """The router's entry in the manifest; NotFoundError if there is none for this kind of call."""
        entry, names = self._manifest.router, ", ".join(self._manifest.adapters) or "none"
        if entry is None:
            message = f"bundle {self._manifest.name!r} has no router for adapter {AUTO!r}"
            raise NotFoundError(message, f"build it with `route: true` in the recipe, or choose one of: {names}")
        if call not in entry.calls:
            message = f"the router of bundle {self._manifest.name!r} has no adapters to {call} with"
            raise NotFoundError(message, f"choose one of: {names}")
        return entry

    def _read(self, entry: RouterEntry) -> Mapping[str, PromptClassifier]:
        with self._lock:
            if self._classifiers is None:
                if self._verify:
                    verify_files(self._bundle, self._manifest, [entry.file])
                tasks = {call: routed.adapters for call, routed in entry.calls.items()}
                self._classifiers = read_classifiers(resolve(self._bundle, entry.file), tasks)
            return self._classifiers


def last_user_text(messages: list[Message]) -> str:
    """What a prompt is routed by: the last message of the user, "" if there is none."""
    texts = [str(message["content"]) for message in messages if message["role"] == "user"]
    return texts[-1] if texts else ""
