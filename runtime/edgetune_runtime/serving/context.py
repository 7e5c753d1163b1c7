"""Adapters and tokens in, logits out: one engine with its live sequence, which it reuses only where that is exact."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from edgetune_runtime.decoding.batch_cost import BatchCost
from edgetune_runtime.engines.base import Engine, Logits
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.serving.governor import AnswerUsage, Governor
from edgetune_runtime.states.activation import Invocations, Spans, spans_of
from edgetune_runtime.states.batches import CHUNK, batches, common_place, places_of
from edgetune_runtime.states.cache import CALLS, PROMPTS, Active, Key, SavedState, StateCache, key_of, reusable
from edgetune_runtime.states.prompts import SHORTEST, PromptStates
from edgetune_runtime.states.store import digest_of
from edgetune_runtime.threads.priority import ComputeThread

from .limits import Stopped
from .turns import Turns

T = TypeVar("T")

_MOST_DECODED = 16
"""Tokens of a step that decodes; more are a part of a prompt."""

_LOG = logging.getLogger(__name__)


def _go_on() -> None:
    """What a call without limits checks."""


@dataclass(frozen=True)
class Start:
    """Logits after a prompt, and what they took: `reused` tokens were not computed anew."""

    logits: Logits
    reused: int
    switch_us: float


@dataclass(frozen=True)
class PromptJob:
    """What a sequence is to begin with: the tokens, and which adapters act where in them.

    The first `fixed` tokens are the part of the prompt that does not change from call to call. `owner` is whose
    sequence it is: no other owner's is taken up beyond its fixed part. `check` is called before each chunk, and ends
    the work by raising.
    """

    tokens: Sequence[int]
    spans: Spans
    fixed: int = 0
    owner: str = CALLS
    check: Callable[[], None] = _go_on

    @property
    def is_worth_a_state(self) -> bool:
        """Whether the fixed part is long enough for its state to be kept."""
        return self.fixed >= SHORTEST


@dataclass(frozen=True)
class Shared:
    """What the contexts of one base share: its fingerprint, saved states, and turns to compute in.

    `invocations` are the tokens from which on some adapters act, and not before. With `exact` a call takes up of what
    others left only what it would compute bit for bit; a session takes up all that is its own in any case. Steps run on
    `thread`, if there is one, else on the caller's.
    """

    base: str
    kv_bytes_per_token: int
    cache: StateCache
    governor: Governor
    invocations: Invocations = field(default_factory=dict)
    prompts: PromptStates | None = None
    turns: Turns = field(default_factory=Turns)
    exact: bool = True
    thread: ComputeThread | None = None


class Context:
    """An engine with one live sequence, and what it shares with others on the same base. Every use is inside `hold`."""

    def __init__(self, engine: Engine, shared: Shared) -> None:
        self.engine = engine
        self.batch_cost = BatchCost(engine.BATCH_COST)
        self.shared = shared
        self.tokens: list[int] = []
        self._key: Key | None = None
        self._ends: list[int] = []
        self.owner = CALLS
        self._fixed = 0
        self._room = engine.capacity({})
        self.holder: int | None = None
        self.closed = False
        self._check: Callable[[], None] = _go_on
        self.usage = AnswerUsage()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other threads out; UsageError when this very thread has a stream open, as waiting would never end."""
        gate = self.shared.turns.gate
        with gate:
            if self.holder == threading.get_ident():
                raise UsageError("a stream of this thread is still open", "read it to its end or close it first")
            while self.holder is not None:
                gate.wait()
            self.holder = threading.get_ident()
        with self.held():
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """What `hold` does once `holder` is set; lets others in at the end."""
        try:
            self.check_open()
            yield
        finally:
            self._check = _go_on
            with self.shared.turns.gate:
                self.holder = None
                self.shared.turns.gate.notify_all()

    def spans(self, adapters: Mapping[str, float], tokens: Sequence[int]) -> Spans:
        """Which of the adapters act where in these tokens."""
        return spans_of(adapters, self.shared.invocations, tokens)

    def start(self, adapters: Mapping[str, float], tokens: Sequence[int]) -> Start:
        """Switch to these adapters and decode the tokens, all but what is known of their beginning."""
        return self.run(PromptJob(tokens, self.spans(adapters, tokens)))

    def run(self, job: PromptJob) -> Start:
        """Begin a sequence as the job says, computing what is not known of it; `usage` counts from here on.

        Stopped, the sequence being as far as it came, when the job's `check` says so.
        """
        self._check, self.usage = job.check, AnswerUsage()
        key, keeps = key_of(self.shared.base, job.spans), self._keeps(job)
        places = self._places(key, job)
        with self._resetting():
            reused, switch_ns = self._begin(key, job, places)
        if _LOG.isEnabledFor(logging.DEBUG):
            _log_start(key, len(job.tokens), reused, switch_ns)
        logits, acting = None, dict(key.spans[-1][1])
        for begin, end in batches(reused, len(job.tokens), places):
            job.check()
            with self._turn():
                if acting != (wanted := _acting(key, begin)):
                    switch_ns += self._activate(wanted)
                    acting = wanted
                logits = self._step(end - begin, partial(self.engine.decode, job.tokens[begin:end]))
                self.tokens = list(job.tokens[:end])
                if begin == _last(self._ends) and end in places:
                    self._ends.append(end)
                if keeps and end == job.fixed:
                    self._keep_prompt(key, job)
        assert logits is not None
        return Start(logits, reused, switch_ns / 1e3)

    def walk(self, adapters: Mapping[str, float], tokens: Sequence[int], rows: int) -> Iterator[Logits]:
        """As `start`, but gives logits after each of the tokens, at most so many rows at once."""
        spans = self.spans(adapters, tokens)
        key = key_of(self.shared.base, spans)
        with self._resetting():
            # The first token is decoded in any case: a state has no logits.
            self._begin(key, PromptJob(tokens[:1], spans), [])
        places = places_of(len(tokens), (since for since, _ in key.spans), rows)
        for begin, end in batches(0, len(tokens), places):
            self._activate(_acting(key, begin))
            yield self.extend(tokens[begin:end])

    def extend(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """Decode more tokens; logits after each of the `last` ones (default: all), shape [last, vocab].

        Stopped as in `run`, the sequence as it was.
        """
        self.check_open()
        decode = partial(self.engine.decode_all, tokens, last=last)
        with self._turn():
            if len(tokens) <= _MOST_DECODED:
                logits = self._step(self.batch_cost.of(len(tokens)), decode, even=True)
            else:
                logits = self._step(len(tokens), decode)
            self.tokens.extend(tokens)
        return logits

    def truncate(self, count: int) -> None:
        """Drop all but the first `count` tokens of the live sequence, such as drafted ones that were wrong."""
        if count >= len(self.tokens):
            return
        with self._resetting():
            kept = self.engine.forget(count)
        lost = self.tokens[kept:count]
        self.tokens, self._ends = self.tokens[:kept], [end for end in self._ends if end <= kept]
        if lost:
            self.extend(lost, last=1)

    def score(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Sum of log probabilities (nats) of each continuation after the sequence, which stays as it is."""
        with self._turn():
            return self._step(sum(map(len, continuations)), partial(self.engine.score, continuations))

    @property
    def is_slow(self) -> bool:
        """Whether the answer's steps so far lacked cores, or were much slower than others were."""
        return self.shared.governor.is_slow(self.usage)

    def saved(self) -> SavedState | None:
        """The live sequence's state; None where there is none."""
        if self._key is None or not self.tokens:
            return None
        return SavedState(self._key, tuple(self.tokens), self.engine.save_state(), tuple(self._ends))

    def identity_of(self, saved: SavedState) -> str:
        """A digest of all that shapes a state, engine and files included; empty where that is not known."""
        prompts = self.shared.prompts
        return digest_of(prompts.identity(saved.key, saved.tokens)) if prompts is not None else ""

    def capacity(self, adapters: Mapping[str, float]) -> int:
        """How many tokens fit in the context with these adapters, prompt and answer together."""
        return self.engine.capacity(adapters)

    @property
    def most_tokens(self) -> int:
        """How many tokens the live sequence may have."""
        return self._room

    def clear(self) -> None:
        """Forget the live sequence and all saved states, but those on the disk."""
        self.reset()
        self.shared.cache.clear()

    def reset(self) -> None:
        """Forget the live sequence."""
        self.tokens, self._ends = [], []
        self._key, self._fixed, self.owner = None, 0, CALLS
        self.engine.forget(0)

    def fork(self) -> Context:
        """Another context on the same loaded base, with a sequence of its own."""
        return Context(self.engine.fork(), self.shared)

    def known(self, job: PromptJob) -> int:
        """How many of the job's tokens the live sequence begins with, as far as the job may take it up."""
        key = key_of(self.shared.base, job.spans)
        return self._known(key, job, self._places(key, job))

    def _known(self, key: Key, job: PromptJob, places: Sequence[int]) -> int:
        if self._key is None:
            return 0
        live = min(reusable((self._key, self.tokens), (key, job.tokens)), len(job.tokens) - 1)
        if job.owner != self.owner:
            live = min(live, self._fixed)
        is_own = job.owner == self.owner != CALLS
        if (self.shared.exact and not is_own) or (live < job.fixed and self._keeps(job)):
            # A state of a fixed prompt is for anyone.
            live = common_place(self._ends, places, live)
        return live

    def close(self) -> None:
        """Free the engine, after other threads' calls have ended; a stream of this thread ends with an error."""
        with self.shared.turns.gate:
            while self.holder not in (None, threading.get_ident()):
                self.shared.turns.gate.wait()
            self.closed = True
            self.shared.cache.clear()
            self.engine.close()

    def check_open(self) -> None:
        """UsageError once the context is closed."""
        if self.closed:
            raise UsageError("the runtime is closed", "open the bundle again")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the cores, and forget the live sequence when something goes wrong."""
        with self.shared.turns.take(self._check), self._resetting():
            yield

    def _step(self, tokens: float, compute: Callable[[], T], *, even: bool = False) -> T:
        thread = self.shared.thread
        run = compute if thread is None else partial(thread.run, compute)
        return self.shared.governor.step(self.engine, tokens, run, self._check, self.usage, even=even)

    @contextmanager
    def _resetting(self) -> Iterator[None]:
        """Forget the live sequence when something goes wrong: an interrupted decode may have left its tokens or not."""
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            _LOG.warning("dropped the live sequence of %d tokens: %s", len(self.tokens), type(error).__name__)
            self.reset()
            raise

    def _begin(self, key: Key, job: PromptJob, places: Sequence[int]) -> tuple[int, int]:
        """Bring the engine's sequence to the longest known beginning of the tokens, one short of all at most.

        What acts in the end is active then. Returns the beginning's tokens, and the nanoseconds that the switch took.
        """
        live = self._known(key, job, places)
        # Looked up before anything is saved, which may drop it.
        found, known = self.shared.cache.best(key, job.tokens, job.owner, places if self.shared.exact else None)
        if (key, job.owner) != (self._key, self.owner):
            self._save()
        # Of another prefix nothing may be left, and a state is restored behind its own.
        acting = dict(key.spans[-1][1])
        switch_ns = self._activate(acting)
        self._key, self.owner, self._room = key, job.owner, self.engine.capacity(acting)
        self._fixed = job.fixed
        if found is not None and known > live:
            live = known if self._restored(found.state, found.ends) else 0
        keep = self.engine.forget(min(live, len(job.tokens) - 1))
        if keep < job.fixed and self._keeps(job):
            keep = self._restore_prompt(key, job, places, keep)
        self.tokens, self._ends = list(job.tokens[:keep]), [end for end in self._ends if end <= keep]
        return keep, switch_ns

    def _places(self, key: Key, job: PromptJob) -> list[int]:
        """Where the job's tokens are cut into batches, whatever is known of them; by what steps take if not exact."""
        cuts = [since for since, _ in key.spans]
        rows = CHUNK if self.shared.exact else self.shared.governor.chunk(CHUNK)
        return places_of(len(job.tokens), [*cuts, job.fixed] if job.is_worth_a_state else cuts, rows)

    def _keeps(self, job: PromptJob) -> bool:
        """Whether the state of the prompt's fixed part is kept anywhere."""
        fits = self.shared.prompts is not None or self.shared.cache.admits(job.fixed * self.shared.kv_bytes_per_token)
        return fits and job.is_worth_a_state

    def _restore_prompt(self, key: Key, job: PromptJob, places: Sequence[int], live: int) -> int:
        """Restore the fixed part's state from memory, or from the disk into memory.

        Returns how many tokens the sequence has then: the `live` ones where there was no state. One in memory is found
        by itself, but where a longer state, which could not be cut back, was taken for more.
        """
        ends = [place for place in places if place <= job.fixed]
        key, tokens = key.until(job.fixed), job.tokens[: job.fixed]
        state = self.shared.cache.prompt(key, tokens)
        if state is not None:
            return job.fixed if self._restored(state, ends) else 0
        prompts = self.shared.prompts
        state = prompts.load(key, tokens) if prompts is not None else None
        if prompts is None or state is None:
            _LOG.debug("miss: no state of the fixed prompt's %d tokens", job.fixed)
            return live
        _LOG.debug("hit: the state of the fixed prompt's %d tokens is on the disk", job.fixed)
        if not self._restored(state, ends):
            prompts.drop(key, tokens)
            return 0
        self.shared.cache.put(SavedState(key, tuple(tokens), state, tuple(ends)), PROMPTS)
        return job.fixed

    def _restored(self, state: memoryview, ends: Sequence[int]) -> bool:
        """Restore a state; False, the sequence then being empty, when the engine refuses it."""
        self._ends = []
        try:
            self.engine.restore_state(state)
        except VerificationError as error:
            _LOG.warning("the engine refuses a saved state, so its tokens are computed again: %s", error)
            return False
        self._ends = list(ends)
        return True

    def _keep_prompt(self, key: Key, job: PromptJob) -> None:
        saved = SavedState(key.until(job.fixed), tuple(self.tokens), self.engine.save_state(), tuple(self._ends))
        self.shared.cache.put(saved, PROMPTS)
        if self.shared.prompts is not None:
            self.shared.prompts.save(saved.key, saved.tokens, saved.state)

    def _activate(self, adapters: Mapping[str, float]) -> int:
        """Switch; returns the nanoseconds that it took."""
        active = {name: scale for name, scale in sorted(adapters.items()) if scale != 0}
        begin = time.perf_counter_ns()
        self.engine.activate(active)
        return time.perf_counter_ns() - begin

    def _save(self) -> None:
        """Keep the live sequence, which is about to be replaced, as far as its owner may take it up again."""
        count = len(self.tokens)
        if self.shared.exact and self.owner == CALLS:
            count = _last(self._ends)
            if count <= self._fixed:
                # Of these, the fixed part is kept by itself.
                return
        if self._key is None or not self.shared.cache.admits(count * self.shared.kv_bytes_per_token):
            return
        if 0 < count == self.engine.forget(count):
            tokens, state = tuple(self.tokens[:count]), self.engine.save_state()
            self.shared.cache.put(SavedState(self._key, tokens, state, tuple(self._ends)), self.owner)


def _last(ends: Sequence[int]) -> int:
    return ends[-1] if ends else 0


def _log_start(key: Key, tokens: int, reused: int, switch_ns: int) -> None:
    names = " ".join(f"{name}={scale:g}" for name, scale in key.spans[-1][1]) or "the base"
    _LOG.debug("switched to %s in %.1f µs", names, switch_ns / 1e3)
    _LOG.debug("%s: %d of %d prompt tokens reused", "hit" if reused else "miss", reused, tokens)


def _acting(key: Key, position: int) -> dict[str, float]:
    """The adapters that act on the token at a position."""
    active: Active = next(active for since, active in reversed(key.spans) if since <= position)
    return dict(active)
