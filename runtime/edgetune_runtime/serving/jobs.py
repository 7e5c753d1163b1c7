"""The prompt that a context computes, its result, and the resources that the contexts on one base share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgetune_runtime.engines.base import Logits
from edgetune_runtime.events import Emit, ignore
from edgetune_runtime.limits import no_limits
from edgetune_runtime.serving.governor import Governor
from edgetune_runtime.states.activation import Spans
from edgetune_runtime.states.cache import CALLS, PROMPTS, Key, SavedState, StateCache
from edgetune_runtime.states.prompts import SHORTEST, PromptStates
from edgetune_runtime.states.sightings import Sightings
from edgetune_runtime.threads.priority import ComputeThreads

from .places import Places


@dataclass(frozen=True)
class PrefillResult:
    """Logits after a prompt, the number of tokens reused from the cache, and the time of the switch."""

    logits: Logits
    reused: int
    switch_us: float


@dataclass(frozen=True)
class PromptJob:
    """The prompt of a call: its tokens, and the adapters that are active in each span of them.

    The first `fixed` tokens are the part of the prompt that other calls have too. From sequences that do not
    belong to `owner`, only the fixed part is reused. If that part `comes_with_call`, it may not come
    again: its state is kept on disk from the second such call on. If it `is_warmed`, it is computed ahead of calls, and
    its state is always kept on disk. `check` is called before each chunk and ends the work
    by raising.
    """

    tokens: Sequence[int]
    spans: Spans
    fixed: int = 0
    owner: str = CALLS
    comes_with_call: bool = False
    is_warmed: bool = False
    check: Callable[[], None] = no_limits

    @property
    def is_worth_a_state(self) -> bool:
        """Whether the fixed part is long enough to save its state."""
        return self.fixed >= SHORTEST


@dataclass(frozen=True)
class SharedResources:
    """What the contexts on one base share: its fingerprint, the cached states, the governor and the places of calls.

    The models of one runtime share the cached states, the places, and the turns of their governors.

    `invocations` are the tokens that activate some of the adapters, which may come and go. With `exact`, a call reuses
    the states of others only where computing them would give the same bits; a session always reuses all of its own
    state. Steps run on `threads` if given, else on the caller's thread. `emit` receives switches. `unsaved` are the
    keys of states that were warmed, and could not be saved on disk.
    """

    base: str
    kv_bytes_per_token: int
    cache: StateCache
    governor: Governor
    invocations: dict[str, Sequence[int]] = field(default_factory=dict)
    prompts: PromptStates | None = None
    sightings: Sightings = field(default_factory=Sightings)
    places: Places = field(default_factory=Places)
    exact: bool = True
    threads: ComputeThreads | None = None
    emit: Emit = ignore
    unsaved: set[Key] = field(default_factory=set)

    def keeps_fixed(self, job: PromptJob) -> bool:
        """Whether the state of the prompt's fixed part will be saved, in memory or on disk."""
        fits = self.prompts is not None or self.cache.admits(job.fixed * self.kv_bytes_per_token)
        return fits and job.is_worth_a_state

    def count_sighting(self, key: Key, job: PromptJob) -> int:
        """How often a fixed part that comes with calls was seen; 0 for the adapter's own, which is always kept."""
        if not job.comes_with_call or not job.is_worth_a_state:
            return 0
        return self.sightings.count(key.until(job.fixed), job.tokens[: job.fixed])

    def keep_fixed(self, saved: SavedState, owner: str, job: PromptJob) -> None:
        """Keep the state of a fixed part in memory, and on disk unless it may not come again."""
        self.cache.put(saved, owner)
        if self.prompts is not None and owner == PROMPTS:
            is_saved = self.prompts.save(saved.key, saved.tokens, saved.state, is_warmed=job.is_warmed)
            if job.is_warmed and not is_saved:
                self.unsaved.add(saved.key)

    def know_adapter(self, name: str, digest: str, invocation: Sequence[int]) -> None:
        """Register a new adapter, whose file has this digest, so that its states can be kept."""
        if invocation:
            self.invocations[name] = invocation
        if self.prompts is not None:
            self.prompts.adapters[name] = digest

    def forget_adapter(self, name: str) -> None:
        """Drop all cached states that an adapter computed, also on disk."""
        self.cache.drop_adapter(name, None if self.prompts is None else self.prompts.adapters.get(name))
        self.invocations.pop(name, None)
        if self.prompts is not None:
            self.prompts.forget_adapter(name)
