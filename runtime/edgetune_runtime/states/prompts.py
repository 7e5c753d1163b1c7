"""Load and save the states of fixed prompts, from the folder that ships with the bundle and from the user's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batches import CHUNK
from .cache import Key, name_of
from .store import StateStore

SHORTEST = 8
"""Shortest fixed part of a prompt, in tokens, whose state is saved."""


@dataclass(frozen=True)
class PromptStates:
    """The folders with states of fixed prompts, and what the states depend on.

    `signatures` are the engine's. `adapters` maps adapter names to the digests of their files, so that a rebuilt
    adapter does not reuse old states. `shipped` is the folder in the bundle: another machine wrote it, so any of the
    signatures is accepted.
    """

    signatures: tuple[str, ...]
    bundle: str
    adapters: dict[str, str]
    store: StateStore | None = None
    shipped: StateStore | None = None

    def load(self, key: Key, tokens: Sequence[int]) -> memoryview | None:
        """The state of these tokens with this key, from the bundle or from the user's folder; None if there is none."""
        sources = [*((self.shipped, signature) for signature in self.signatures), (self.store, self.signatures[0])]
        for store, signature in sources:
            state = store.load(self.identity(key, tokens, signature)) if store is not None else None
            if state is not None:
                return state
        return None

    def save(self, key: Key, tokens: Sequence[int], state: memoryview, *, is_warmed: bool = False) -> bool:
        """Save a state, if there is a folder for it; returns whether it is on disk. See `StateStore.save`."""
        if self.store is None:
            return False
        label = f"{self.bundle}: {name_of(dict(key.spans[-1][1]))}"
        return self.store.save(self.identity(key, tokens), state, label, len(tokens), is_warmed=is_warmed)

    def drop(self, key: Key, tokens: Sequence[int]) -> None:
        """Delete a state that the engine refused."""
        if self.store is not None:
            self.store.drop(self.identity(key, tokens))

    def forget_adapter(self, name: str) -> None:
        """Delete the states that an adapter computed, which is removed."""
        digest = self.adapters.pop(name, None)
        if self.store is not None and digest is not None:
            self.store.drop_adapter(digest)

    def identity(self, key: Key, tokens: Sequence[int], signature: str | None = None) -> Mapping[str, Any]:
        """Everything that determines the state, as JSON values; by default with the engine's own signature."""
        spans = [
            [start, [[self.adapters.get(name, ""), scale] for name, scale in active]] for start, active in key.spans
        ]
        digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
        return {
            "engine": signature or self.signatures[0],
            "batch": CHUNK,
            "base": key.base,
            "spans": spans,
            "tokens": digest,
        }
