"""Makes a task's draft table from its training answers: the n-grams that a runtime drafts its answers from.

Of all n-grams those are kept that save most steps: that occur at least twice, are likely enough to be worth verifying,
and say something else than the shorter context that a lookup would fall back to.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgetune_runtime.decoding.batch_cost import BatchCost
from edgetune_runtime.decoding.drafts import END, LONGEST_CONTEXT, LONGEST_DRAFT, Drafter, DraftTable, context_keys

MOST_ENTRIES = 24_000
"""13 bytes each: 312 kB."""

_LEAST_COUNT = 2
_LEAST_SHARE = 0.3
_REDUNDANT = 0.1
"""A longer context that expects the same token, by so much more probably at most, is left out."""
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
        for place in range(row.prompt_length, len(row.tokens)):
            token = row.tokens[place]
            before: int | None = None
            for key in context_keys(row.tokens[max(0, place - LONGEST_CONTEXT) : place]):
                counts[key][END if token in ends else token] += 1
                shorter[key], before = before, key
            if token in ends:
                break
    best = {key: _best(counter) for key, counter in counts.items()}
    kept = _pruned(best, shorter)
    empty = DraftTable(tokenizer_sha256, (), (), ())
    entries = {key: (token, share) for key, (token, share, _) in kept.items()}
    return DraftTable.of(entries, _copied(rows, empty), tokenizer_sha256)


def tokens_per_step(table: DraftTable, rows: Iterable[Row], cost: BatchCost) -> float:
    """Mean tokens per step if the model answers these rows as they are written, drafts cut where `cost` says so."""
    tokens = steps = 0
    for row in rows:
        drafter = Drafter(table, list(row.tokens[: row.prompt_length]))
        answer = list(row.tokens[row.prompt_length :])
        place = 0
        while place < len(answer):
            drafter.add(answer[place : place + 1])
            draft, chances = drafter.propose(LONGEST_DRAFT)
            count = cost.worthwhile(chances)
            accepted = _common(draft[:count], answer[place + 1 :])
            drafter.learn(chances[:count], accepted)
            drafter.add(draft[:accepted])
            steps, tokens, place = steps + 1, tokens + 1 + accepted, place + 1 + accepted
    return tokens / steps if steps else 1.0


def _best(counter: Counter[int]) -> tuple[int, float, int]:
    """The most frequent token, its share, and how often it occurred."""
    token, count = counter.most_common(1)[0]
    return token, count / (counter.total() + _PRIOR), count


def _pruned(
    best: Mapping[int, tuple[int, float, int]], shorter: Mapping[int, int | None]
) -> dict[int, tuple[int, float, int]]:
    """The entries worth keeping, at most `MOST_ENTRIES`, the most frequent ones."""
    kept: dict[int, tuple[int, float, int]] = {}
    for key, (token, share, count) in best.items():
        fallback = shorter[key]
        if count < _LEAST_COUNT:
            continue
        says_more = fallback is None or best[fallback][0] != token or share > best[fallback][1] + _REDUNDANT
        # What is unlikely is kept where it takes back a shorter context's more confident guess.
        corrects = fallback is not None and best[fallback][1] >= _LEAST_SHARE
        if says_more and (share >= _LEAST_SHARE or corrects):
            kept[key] = (token, share, count)
    frequent = sorted(kept, key=lambda key: kept[key][2], reverse=True)[:MOST_ENTRIES]
    return {key: kept[key] for key in frequent}


def _copied(rows: Sequence[Row], empty: DraftTable) -> list[float]:
    """How often the token behind a repetition of 1, 2, ... tokens is the next one."""
    seen, right = [0] * LONGEST_CONTEXT, [0] * LONGEST_CONTEXT
    for row in rows:
        drafter = Drafter(empty, list(row.tokens[: row.prompt_length]))
        for token in row.tokens[row.prompt_length :]:
            repeated, length = drafter.repeated()
            if length:
                seen[length - 1] += 1
                right[length - 1] += repeated == token
            drafter.add([token])
    return [hits / (count + _PRIOR) for hits, count in zip(right, seen, strict=True)]


def _common(draft: Sequence[int], answer: Sequence[int]) -> int:
    pairs = zip(draft, answer, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(draft), len(answer)))
