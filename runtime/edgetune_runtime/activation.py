"""Adapters and tokens in, which adapters act from which token on out: the gating of activated LoRA.

Such an adapter acts from the first of its invocation tokens on, where they stand last, and not at all where they do not
stand: Greenewald et al. 2025, arXiv:2504.12397, and PEFT's `calculate_alora_offsets`. What lies before is the base's,
whose keys and values can be reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import UsageError

Invocations = Mapping[str, Sequence[int]]
"""The invocation tokens of each adapter that has some."""


@dataclass(frozen=True)
class Phases:
    """Adapters with scales that act on a text: `first` from its first token on, and from token `since` on `then`."""

    first: Mapping[str, float]
    then: Mapping[str, float]
    since: int = 0


def phases(adapters: Mapping[str, float], invocations: Invocations, tokens: Sequence[int]) -> Phases:
    """Which of the adapters act where in these tokens; UsageError for two that wait for tokens of their own."""
    waiting = [name for name, scale in adapters.items() if invocations.get(name) and scale != 0]
    if len(waiting) > 1:
        message = f"adapters {waiting[0]!r} and {waiting[1]!r} each act from tokens of their own on"
        raise UsageError(message, "use one of them at a time")
    if not waiting:
        return Phases(adapters, adapters)
    others = {name: scale for name, scale in adapters.items() if name != waiting[0]}
    since = last_place(tokens, invocations[waiting[0]])
    if since is None:
        return Phases(others, others)
    return Phases(others, adapters, since) if since else Phases(adapters, adapters)


def last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where the wanted tokens stand last; None where they do not."""
    starts, whole = range(len(tokens) - len(wanted), -1, -1), list(wanted)
    return next((start for start in starts if list(tokens[start : start + len(whole)]) == whole), None)
