"""Activated LoRA: which adapters are active in which span of a sequence.

An activated LoRA is active from the last occurrence of its invocation tokens on, and nowhere if they do not occur:
Greenewald et al. 2025, arXiv:2504.12397, and PEFT's `calculate_alora_offsets`. The tokens before are computed by the
base, whose keys and values can be reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune_runtime.errors import UsageError

Invocations = Mapping[str, Sequence[int]]
"""The invocation tokens of each activated LoRA."""

Spans = tuple[tuple[int, Mapping[str, float]], ...]
"""The start of each span and its adapters with their scales; the first span starts at token 0."""


def spans_of(adapters: Mapping[str, float], invocations: Invocations, tokens: Sequence[int]) -> Spans:
    """The adapters that are active in each span of these tokens; UsageError for two activated LoRAs."""
    waiting = [name for name, scale in adapters.items() if invocations.get(name) and scale != 0]
    if len(waiting) > 1:
        message = f"adapters {waiting[0]!r} and {waiting[1]!r} both have invocation tokens"
        raise UsageError(message, "use one of them at a time")
    if not waiting:
        return ((0, adapters),)
    others = {name: scale for name, scale in adapters.items() if name != waiting[0]}
    start = last_occurrence(tokens, invocations[waiting[0]])
    if start is None:
        return ((0, others),)
    return ((0, others), (start, adapters)) if start else ((0, adapters),)


def join_spans(earlier: Spans, count: int, own: Spans) -> Spans:
    """The spans of `earlier` for the first `count` tokens, then those of `own`."""
    kept = [(start, adapters) for start, adapters in earlier if start < count]
    return (*kept, *((max(start, count), adapters) for start, adapters in own)) if kept else own


def last_occurrence(tokens: Sequence[int], pattern: Sequence[int]) -> int | None:
    """The start of the last occurrence of `pattern` in `tokens`; None if there is none."""
    starts, whole = range(len(tokens) - len(pattern), -1, -1), list(pattern)
    return next((start for start in starts if list(tokens[start : start + len(whole)]) == whole), None)


def start_of(tokens: Sequence[int], invocation: Sequence[int]) -> int:
    """The position from which an activated LoRA is active; the number of tokens if it never is."""
    start = last_occurrence(tokens, invocation)
    return len(tokens) if start is None else start
