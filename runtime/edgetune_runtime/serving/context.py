"""One engine with its current sequence, whose KV cache is reused for the next prompt where that is exact."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from edgetune_runtime.decoding.batch_cost import BatchCost
from edgetune_runtime.engines.base import Engine, Logits
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.events import Event
from edgetune_runtime.limits import Stopped
from edgetune_runtime.serving.governor import AnswerUsage
from edgetune_runtime.states.activation import Spans, spans_of
from edgetune_runtime.states.batches import CHUNK, batches, boundaries_of, common_boundary
from edgetune_runtime.states.cache import CALLS, FROM_CALL, PROMPTS, Active, Key, SavedState, key_of, name_of, reusable
from edgetune_runtime.states.store import digest_of
from edgetune_runtime.threads.count import DECODE, PREFILL, Kind

from .held_context import HeldContext
from .jobs import PrefillResult, PromptJob, SharedResources

T = TypeVar("T")

_AGAIN = 2
"""How often a fixed part that comes with calls has to be seen for its state to be saved on disk."""
_MAX_DECODED = 16
"""Tokens of a step that decodes; more are a part of a prompt."""

_LOG = logging.getLogger(__name__)


class Context(HeldContext):
    """An engine with its current sequence, and what it shares with other contexts. Use it only inside `hold`."""

    def __init__(self, engine: Engine, shared: SharedResources) -> None:
        super().__init__(engine, shared.places)
        # Without a filler where it could not be dropped again.
        self.least_rows = engine.EVEN_ROWS if shared.exact and engine.max_rollback is None else 1
        """Tokens that a step of an answer has at least, so that its rounding does not depend on drafts."""
        self.batch_cost = BatchCost(engine.BATCH_COST, engine.LOGITS_COST, engine.logits_excess, self.least_rows)
        self.shared = shared
        self.tokens: list[int] = []
        self._key: Key | None = None
        self._ends: list[int] = []
        self.owner = CALLS
        self._fixed = 0
        self._capacity = engine.capacity({})
        self.usage = AnswerUsage()

    def spans(self, adapters: Mapping[str, float], tokens: Sequence[int]) -> Spans:
        """The adapters that are active in each span of these tokens."""
        return spans_of(adapters, self.shared.invocations, tokens)

    def start(self, adapters: Mapping[str, float], tokens: Sequence[int]) -> PrefillResult:
        """Switch to these adapters and prefill the tokens, except for a cached prefix."""
        return self.run(PromptJob(tokens, self.spans(adapters, tokens)))

    def run(self, job: PromptJob) -> PrefillResult:
        """Prefill the job's prompt, except for a cached prefix, and reset `usage`.

        Raises Stopped when the job's `check` does; the tokens computed until then stay in the sequence.
        """
        self._check, self.usage = job.check, AnswerUsage()
        key = key_of(self.shared.base, job.spans)
        boundaries, keeps = self._boundaries(key, job), self.shared.keeps_fixed(job)
        seen = self.shared.count_sighting(key, job)
        with self._resetting():
            reused, switch_ns = self._begin(key, job, boundaries)
            if keeps and seen == _AGAIN and reused >= job.fixed:
                reused = self._keep_reused(key, job, reused)
        if _LOG.isEnabledFor(logging.DEBUG):
            _log_start(key, len(job.tokens), reused, switch_ns)
        logits, active = None, dict(key.spans[-1][1])
        for begin, end in batches(reused, len(job.tokens), boundaries):
            job.check()
            with self._resetting():
                if active != (next_active := _active_at(key, begin)):
                    switch_ns += self._activate(next_active)
                    active = next_active
                logits = self._step(end - begin, partial(self.engine.decode, job.tokens[begin:end]))
                self.tokens = list(job.tokens[:end])
                if begin == _last(self._ends) and end in boundaries:
                    self._ends.append(end)
                if keeps and end == job.fixed:
                    state = SavedState(key.until(end), tuple(self.tokens), self.engine.save_state(), tuple(self._ends))
                    self.shared.keep_fixed(state, FROM_CALL if seen == 1 else PROMPTS, job)
        assert logits is not None
        return PrefillResult(logits, reused, switch_ns / 1e3)

    def walk(self, adapters: Mapping[str, float], tokens: Sequence[int], rows: int) -> Iterator[Logits]:
        """Like `start`, but yields the logits after each token, at most `rows` at a time."""
        spans = self.spans(adapters, tokens)
        key = key_of(self.shared.base, spans)
        with self._resetting():
            # Compute at least the first token: a state contains no logits.
            self._begin(key, PromptJob(tokens[:1], spans), [])
        boundaries = boundaries_of(len(tokens), (start for start, _ in key.spans), rows)
        for begin, end in batches(0, len(tokens), boundaries):
            self._activate(_active_at(key, begin))
            yield self.extend(tokens[begin:end])

    def extend(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """Decode more tokens; logits after each of the `last` ones (default: all), shape [last, vocab].

        Raises Stopped, leaving the sequence unchanged.
        """
        self.check_open()
        decode = partial(self.engine.decode_all, tokens, last=last)
        with self._resetting():
            if len(tokens) <= _MAX_DECODED:
                logits = self._step(self.batch_cost.of(len(tokens)), decode, kind=DECODE)
            else:
                logits = self._step(len(tokens), decode)
            self.tokens.extend(tokens)
        return logits

    def truncate(self, count: int) -> None:
        """Truncate the sequence to `count` tokens, such as after a rejected draft."""
        if count >= len(self.tokens):
            return
        with self._resetting():
            kept = self.engine.truncate(count)
        lost = self.tokens[kept:count]
        self.tokens, self._ends = self.tokens[:kept], [end for end in self._ends if end <= kept]
        if lost:
            assert self._key is not None
            for begin, end in batches(kept, count, [start for start, _ in self._key.spans]):
                self._activate(_active_at(self._key, begin))
                self.extend(lost[begin - kept : end - kept], last=1)
            # What follows is of the last span, also if the cut is at its start.
            self._activate(dict(self._key.spans[-1][1]))

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Sum of log probabilities (nats) of each continuation of the sequence, which is not changed."""
        with self._resetting():
            return self._step(sum(map(len, continuations)), partial(self.engine.score, continuations))

    @property
    def is_slow(self) -> bool:
        """Whether this answer's steps lacked cores or were much slower than usual."""
        return self.shared.governor.is_slow(self.usage)

    def saved(self) -> SavedState | None:
        """The state of the current sequence; None if it is empty."""
        if self._key is None or not self.tokens:
            return None
        return SavedState(self._key, tuple(self.tokens), self.engine.save_state(), tuple(self._ends))

    def identity_of(self, saved: SavedState) -> str:
        """A digest of everything that determines a state, including engine and files; empty without `prompts`."""
        prompts = self.shared.prompts
        return digest_of(prompts.identity(saved.key, saved.tokens)) if prompts is not None else ""

    @property
    def max_tokens(self) -> int:
        """The number of tokens that fit in the sequence."""
        return self._capacity

    def clear(self) -> None:
        """Drop the current sequence and all cached states, except those on disk."""
        self.reset()
        self.shared.cache.clear()

    def reset(self) -> None:
        """Drop the current sequence."""
        self.tokens, self._ends = [], []
        self._key, self._fixed, self.owner = None, 0, CALLS
        self.engine.truncate(0)

    def depends_on(self, adapter: str) -> bool:
        """Whether an adapter computed a part of the current sequence."""
        return self._key is not None and any(adapter in dict(active) for _, active in self._key.spans)

    def fork(self) -> Context:
        """Another context with its own sequence, on the same loaded base."""
        return Context(self.engine.fork(), self.shared)

    def reusable_tokens(self, job: PromptJob) -> int:
        """The length of the prefix of the current sequence that this job may reuse."""
        key = key_of(self.shared.base, job.spans)
        return self._reusable_tokens(key, job, self._boundaries(key, job))

    def _reusable_tokens(self, key: Key, job: PromptJob, boundaries: Sequence[int]) -> int:
        if self._key is None:
            return 0
        live = min(reusable((self._key, self.tokens), (key, job.tokens)), len(job.tokens) - 1)
        if job.owner != self.owner:
            live = min(live, self._fixed)
        is_own = job.owner == self.owner != CALLS
        if (self.shared.exact and not is_own) or (live < job.fixed and self.shared.keeps_fixed(job)):
            # Others will reuse the state of a fixed prompt, so it must be exact.
            live = common_boundary(self._ends, boundaries, live)
        return live

    def retire(self) -> None:
        """Keep the state of the sequence in the cache, and free the context. Nothing may hold it."""
        self._save()
        self.closed = True
        self.engine.close()

    def _step(self, tokens: float, compute: Callable[[], T], *, kind: Kind = PREFILL) -> T:
        threads = self.shared.threads
        # Each step may run on another of these threads.
        run = compute if threads is None else partial(threads.run, partial(_ending, compute, self.engine.end_threads))
        return self.shared.governor.step(self.engine, tokens, run, self._check, self.usage, kind=kind)

    @contextmanager
    def _resetting(self) -> Iterator[None]:
        """Drop the current sequence if the block fails: a failed decode may or may not have added its tokens."""
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            _LOG.warning("dropped the current sequence of %d tokens: %s", len(self.tokens), type(error).__name__)
            self.reset()
            raise

    def _begin(self, key: Key, job: PromptJob, boundaries: Sequence[int]) -> tuple[int, int]:
        """Set the engine's sequence to the longest cached prefix of the prompt, without the prompt's last token.

        Activates the adapters of the last span. Returns the length of the prefix, and the time of the switch in ns.
        """
        live = self._reusable_tokens(key, job, boundaries)
        # Look up before saving, which may evict the state.
        exact, whole = boundaries if self.shared.exact else None, self.engine.max_rollback is not None
        best, cached = self.shared.cache.best(key, job.tokens, job.owner, exact, whole=whole)
        if (key, job.owner) != (self._key, self.owner):
            self._save()
        # Activate first: changing the prefix drops the sequence, and a state is restored after its own prefix.
        active = dict(key.spans[-1][1])
        was_active = None if self._key is None else dict(self._key.spans[-1][1])
        switch_ns = self._activate(active)
        if active != was_active:
            self.shared.emit(Event("switched", name_of(active), seconds=switch_ns / 1e9))
        self._key, self.owner, self._capacity = key, job.owner, self.engine.capacity(active)
        self._fixed = job.fixed
        if best is not None and cached > live:
            live = cached if self._restored(best.state, len(best.tokens), best.ends) else 0
        keep = self.engine.truncate(min(live, len(job.tokens) - 1))
        if keep < job.fixed and self.shared.keeps_fixed(job):
            keep = self._restore_prompt(key, job, boundaries, keep)
        self.tokens, self._ends = list(job.tokens[:keep]), [end for end in self._ends if end <= keep]
        return keep, switch_ns

    def _boundaries(self, key: Key, job: PromptJob) -> list[int]:
        """Where the job's tokens are split into batches. If exact, this is the same with a warm or a cold cache."""
        cuts = [start for start, _ in key.spans]
        rows = CHUNK if self.shared.exact else self.shared.governor.chunk(CHUNK)
        return boundaries_of(len(job.tokens), [*cuts, job.fixed] if job.is_worth_a_state else cuts, rows)

    def _restore_prompt(self, key: Key, job: PromptJob, boundaries: Sequence[int], live: int) -> int:
        """Restore the state of the fixed part from memory, or from disk into memory.

        Returns the length of the sequence afterwards, which is `live` if there was no state. `StateCache.best` usually
        finds a state in memory already, unless it preferred a longer one that the engine could not truncate.
        """
        ends = [place for place in boundaries if place <= job.fixed]
        key, tokens = key.until(job.fixed), job.tokens[: job.fixed]
        state = self.shared.cache.prompt(key, tokens)
        if state is not None:
            return job.fixed if self._restored(state, job.fixed, ends) else 0
        prompts = self.shared.prompts
        state = prompts.load(key, tokens) if prompts is not None else None
        if prompts is None or state is None:
            _LOG.debug("miss: no state for the fixed prompt of %d tokens", job.fixed)
            return live
        _LOG.debug("hit: restored the state of the fixed prompt of %d tokens from disk", job.fixed)
        if not self._restored(state, job.fixed, ends):
            prompts.drop(key, tokens)
            return 0
        self.shared.cache.put(SavedState(key, tuple(tokens), state, tuple(ends)), PROMPTS)
        return job.fixed

    def _restored(self, state: memoryview, length: int, ends: Sequence[int]) -> bool:
        """Restore a state of `length` tokens; False, and an empty sequence, if it has others or is refused."""
        self._ends = []
        try:
            self.engine.restore_state(state)
            held = self.engine.truncate(self.engine.context_length)
            if held != length:
                self.engine.truncate(0)
                raise VerificationError(f"it has {held} tokens in place of {length}")
        except VerificationError as error:
            _LOG.warning("the engine refused a saved state, so its tokens are recomputed: %s", error)
            return False
        self._ends = list(ends)
        return True

    def _keep_reused(self, key: Key, job: PromptJob, reused: int) -> int:
        """Keep the state of a fixed part that was reused, also on disk; the number of tokens that are still reused."""
        key, tokens = key.until(job.fixed), tuple(job.tokens[: job.fixed])
        ends = tuple(end for end in self._ends if end <= job.fixed)
        if (state := self.shared.cache.prompt(key, tokens)) is not None:
            self.shared.keep_fixed(SavedState(key, tokens, state, ends), PROMPTS, job)
            return reused
        if job.fixed not in ends:
            return reused
        # Only the sequence has it, with other tokens after it.
        kept = self.engine.truncate(job.fixed)
        self.tokens, self._ends = self.tokens[:kept], [end for end in ends if end <= kept]
        if kept == job.fixed:
            self.shared.keep_fixed(SavedState(key, tokens, self.engine.save_state(), ends), PROMPTS, job)
        return kept

    def _activate(self, adapters: Mapping[str, float]) -> int:
        """Switch to these adapters; returns the time in ns."""
        active = {name: scale for name, scale in sorted(adapters.items()) if scale != 0}
        begin = time.perf_counter_ns()
        self.engine.activate(active)
        return time.perf_counter_ns() - begin

    def _save(self) -> None:
        """Cache the state of the current sequence before it is replaced, as far as its owner can reuse it."""
        count = len(self.tokens)
        if self.shared.exact and self.owner == CALLS:
            count = _last(self._ends)
            if count <= self._fixed:
                # The fixed part has its own state.
                return
        if self._key is None or not self.shared.cache.admits(count * self.shared.kv_bytes_per_token):
            return
        if 0 < count == self.engine.truncate(count):
            tokens, state = tuple(self.tokens[:count]), self.engine.save_state()
            self.shared.cache.put(SavedState(self._key, tokens, state, tuple(self._ends)), self.owner)


def _last(ends: Sequence[int]) -> int:
    return ends[-1] if ends else 0


def _log_start(key: Key, tokens: int, reused: int, switch_ns: int) -> None:
    _LOG.debug("switched to %s in %.1f µs", name_of(dict(key.spans[-1][1])), switch_ns / 1e3)
    _LOG.debug("%s: %d of %d prompt tokens reused", "hit" if reused else "miss", reused, tokens)


def _active_at(key: Key, position: int) -> dict[str, float]:
    """The adapters that are active at a position."""
    active: Active = next(active for start, active in reversed(key.spans) if start <= position)
    return dict(active)


def _ending(compute: Callable[[], T], end_threads: Callable[[], None]) -> T:
    try:
        return compute()
    finally:
        end_threads()
