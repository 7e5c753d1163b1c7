"""Makes a task's draft table from its training answers: the n-grams that a runtime drafts its answers from.

The n-grams that save most steps are kept: they occur at least twice, are likely enough to be worth verifying, and
predict another token than the shorter context that a lookup would fall back to, or the same one more confidently.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgetune_runtime.decoding.batch_cost import BatchCost
from edgetune_runtime.decoding.drafts import (
    EMPTY,
    END,
    LONGEST_CONTEXT,
    LONGEST_DRAFT,
    Drafter,
    DraftTable,
    context_keys,
)
from edgetune_runtime.states.cache import common_prefix

MAX_ENTRIES = 24_000
"""13 bytes each: 312 kB."""

_MIN_COUNT = 2
_MIN_SHARE = 0.3
_REDUNDANT = 0.1
"""A longer context that predicts the same token is left out if its probability is higher by at most this."""
_PRIOR = 1.0


@dataclass(frozen=True)
class Row:
    """A task's row: all its tokens, of which those from `prompt_length` on are the answer."""

    tokens: Sequence[int]
    prompt_length: int


def table_of(rows: Sequence[Row], is_end: Callable[[int], bool], tokenizer_sha256: str) -> DraftTable:
    """The table of a task from its training rows; empty where nothing repeats itself."""
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    shorter: dict[int, int | None] = {}
    ends = {token for row in rows for token in row.tokens[row.prompt_length :] if is_end(token)}
    for row in rows:
        for position in range(row.prompt_length, len(row.tokens)):
            token = row.tokens[position]
            before: int | None = None
            for key in context_keys(row.tokens[max(0, position - LONGEST_CONTEXT) : position]):
                counts[key][END if token in ends else token] += 1
                shorter[key], before = before, key
            if token in ends:
                break
    best = {key: _best(counter) for key, counter in counts.items()}
    kept = _pruned(best, shorter)
    entries = {key: (token, share) for key, (token, share, _) in kept.items()}
    return DraftTable.of(entries, _copy_rates(rows), tokenizer_sha256)


def tokens_per_step(table: DraftTable, rows: Iterable[Row], cost: BatchCost) -> float:
    """Mean tokens per step if the model answers these rows as they are written, drafts cut where `cost` says so."""
    tokens = steps = 0
    for row in rows:
        drafter = Drafter(table, list(row.tokens[: row.prompt_length]))
        answer = list(row.tokens[row.prompt_length :])
        position = 0
        while position < len(answer):
            drafter.add(answer[position : position + 1])
            draft, chances = drafter.propose(LONGEST_DRAFT)
            count = cost.worthwhile(chances)
            accepted = common_prefix(draft[:count], answer[position + 1 :])
            drafter.learn(chances[:count], accepted)
            drafter.add(draft[:accepted])
            steps, tokens, position = steps + 1, tokens + 1 + accepted, position + 1 + accepted
    return tokens / steps if steps else 1.0


def _best(counter: Counter[int]) -> tuple[int, float, int]:
    """The most frequent token, its share, and how often it occurred."""
    token, count = counter.most_common(1)[0]
    return token, count / (counter.total() + _PRIOR), count


def _pruned(
    best: Mapping[int, tuple[int, float, int]], shorter: Mapping[int, int | None]
) -> dict[int, tuple[int, float, int]]:
    """The entries worth keeping, at most `MAX_ENTRIES`, the most frequent ones."""
    kept: dict[int, tuple[int, float, int]] = {}
    for key, (token, share, count) in best.items():
        fallback = shorter[key]
        if count < _MIN_COUNT:
            continue
        adds_information = fallback is None or best[fallback][0] != token or share > best[fallback][1] + _REDUNDANT
        # An unlikely token is kept where it overrides a shorter context's more confident guess.
        corrects = fallback is not None and best[fallback][1] >= _MIN_SHARE
        if adds_information and (share >= _MIN_SHARE or corrects):
            kept[key] = (token, share, count)
    frequent = sorted(kept, key=lambda key: kept[key][2], reverse=True)[:MAX_ENTRIES]
    return {key: kept[key] for key in frequent}


def _copy_rates(rows: Sequence[Row]) -> list[float]:
    """How often the token after a repetition of 1, 2, … tokens is the next one."""
    seen, right = [0] * LONGEST_CONTEXT, [0] * LONGEST_CONTEXT
    for row in rows:
        drafter = Drafter(EMPTY, list(row.tokens[: row.prompt_length]))
        for token in row.tokens[row.prompt_length :]:
            repeated, length = drafter.repeated()
            if length:
                seen[length - 1] += 1
                right[length - 1] += repeated == token
            drafter.add([token])
    return [hits / (count + _PRIOR) for hits, count in zip(right, seen, strict=True)]
