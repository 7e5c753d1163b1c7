"""Adapters and tokens in, which adapters act from which token on out: the gating of activated LoRA.

Such an adapter acts from the first of its invocation tokens on, where they stand last, and not at all where they do not
stand: Greenewald et al. 2025, arXiv:2504.12397, and PEFT's `calculate_alora_offsets`. What lies before is the base's,
whose keys and values can be reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune_runtime.errors import UsageError

Invocations = Mapping[str, Sequence[int]]
"""The invocation tokens of each adapter that has some."""

Spans = tuple[tuple[int, Mapping[str, float]], ...]
"""Adapters with scales, each set from a token on; the first from the first token on."""


def spans_of(adapters: Mapping[str, float], invocations: Invocations, tokens: Sequence[int]) -> Spans:
    """Which of the adapters act where in these tokens; UsageError for two that wait for tokens of their own."""
    waiting = [name for name, scale in adapters.items() if invocations.get(name) and scale != 0]
    if len(waiting) > 1:
        message = f"adapters {waiting[0]!r} and {waiting[1]!r} each act from tokens of their own on"
        raise UsageError(message, "use one of them at a time")
    if not waiting:
        return ((0, adapters),)
    others = {name: scale for name, scale in adapters.items() if name != waiting[0]}
    since = last_place(tokens, invocations[waiting[0]])
    if since is None:
        return ((0, others),)
    return ((0, others), (since, adapters)) if since else ((0, adapters),)


def behind(earlier: Spans, count: int, own: Spans) -> Spans:
    """Spans of which the first `count` tokens stay those of `earlier`, and `own` act on the others."""
    kept = [(since, adapters) for since, adapters in earlier if since < count]
    return (*kept, *((max(since, count), adapters) for since, adapters in own)) if kept else own


def last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where the wanted tokens stand last; None where they do not."""
    starts, whole = range(len(tokens) - len(wanted), -1, -1), list(wanted)
    return next((start for start in starts if list(tokens[start : start + len(whole)]) == whole), None)


def start_of(tokens: Sequence[int], invocation: Sequence[int]) -> int:
    """The first token that the adapter acts on; their number where there is none."""
    place = last_place(tokens, invocation)
    return len(tokens) if place is None else place
