"""The fixed part of a prompt in, its state out: from the folders that hold it, or kept there once it was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batches import CHUNK
from .cache import Key
from .store import StateStore

SHORTEST = 16
"""Tokens from which on a prompt's fixed part is worth a state."""


@dataclass(frozen=True)
class PromptStates:
    """Where states of fixed prompts are kept beyond this process, and what they depend on.

    `signatures` are the engine's. `adapters` maps names to the digests of their files, so that an adapter that was
    built again has no state. `shipped` came with the bundle: as another machine made it, any signature will do.
    """

    signatures: tuple[str, ...]
    bundle: str
    adapters: Mapping[str, str]
    store: StateStore | None = None
    shipped: StateStore | None = None

    def load(self, key: Key, tokens: Sequence[int]) -> memoryview | None:
        """The state of these tokens under this key, from what came with the bundle or from the disk."""
        places = [*((self.shipped, signature) for signature in self.signatures), (self.store, self.signatures[0])]
        for store, signature in places:
            state = store.load(self.identity(key, tokens, signature)) if store is not None else None
            if state is not None:
                return state
        return None

    def save(self, key: Key, tokens: Sequence[int], state: memoryview) -> None:
        """Keep a state on the disk, if there is a place for it."""
        if self.store is not None:
            names = " ".join(name if scale == 1 else f"{name}={scale:g}" for name, scale in key.spans[-1][1])
            self.store.save(self.identity(key, tokens), state, f"{self.bundle}: {names or 'base'}", len(tokens))

    def drop(self, key: Key, tokens: Sequence[int]) -> None:
        """Delete a state that the engine refused."""
        if self.store is not None:
            self.store.drop(self.identity(key, tokens))

    def identity(self, key: Key, tokens: Sequence[int], signature: str | None = None) -> Mapping[str, Any]:
        """All that shapes the state, as JSON values; the engine's own signature unless another is given."""
        spans = [
            [since, [[self.adapters.get(name, ""), scale] for name, scale in active]] for since, active in key.spans
        ]
        digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
        return {
            "engine": signature or self.signatures[0],
            "batch": CHUNK,
            "base": key.base,
            "spans": spans,
            "tokens": digest,
        }
