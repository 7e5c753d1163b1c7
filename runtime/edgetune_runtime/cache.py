"""Tokens and adapters in, reusable state out: which keys and values may stand in for a computation. No engine here.

Keys and values depend on the base, on the exact set of active adapters with their scales, and on the tokens. A state is
reused only where all of these match, so no adapter's state can ever shape another's answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """What shapes a state besides its tokens."""

    base: str
    adapters: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class SavedState:
    """An engine's state of a sequence of tokens."""

    tokens: tuple[int, ...]
    state: bytes


def key_of(base: str, adapters: Mapping[str, float]) -> Key:
    """The key of a base (its fingerprint) with these adapters; order and adapters of scale 0 make no difference."""
    return Key(base, tuple(sorted((name, float(scale)) for name, scale in adapters.items() if scale != 0)))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both sequences begin with."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


class StateCache:
    """The last saved state of each key, at most `budget_mb` (10^6 bytes) in all; the longest unused goes first."""

    def __init__(self, budget_mb: float) -> None:
        self._budget = int(budget_mb * 1e6)
        self._states: OrderedDict[Key, SavedState] = OrderedDict()
        self.bytes = 0

    def admits(self, size: int) -> bool:
        """Whether a state of so many bytes could be kept at all."""
        return size <= self._budget

    def put(self, key: Key, tokens: Sequence[int], state: bytes) -> None:
        """Keep a state in place of the key's last one, dropping others where room is needed."""
        self._drop(key)
        if not self.admits(len(state)):
            return
        while self.bytes + len(state) > self._budget:
            self._drop(next(iter(self._states)))
        self._states[key] = SavedState(tuple(tokens), state)
        self.bytes += len(state)

    def get(self, key: Key) -> SavedState | None:
        """The state kept for the key, which counts as use."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def clear(self) -> None:
        """Drop all states."""
        self._states.clear()
        self.bytes = 0

    def _drop(self, key: Key) -> None:
        dropped = self._states.pop(key, None)
        if dropped is not None:
            self.bytes -= len(dropped.state)
