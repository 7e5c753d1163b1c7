"""A prepared call, before the answer is generated: the job, its pool and adapters, and the output constraint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.decoding.drafts import DraftTable
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.decoding.past_answers import PastAnswer
from edgetune_runtime.serving.adapters import Entries, LoadedAdapters, MergedPool
from edgetune_runtime.serving.context import Context
from edgetune_runtime.serving.jobs import PromptJob
from edgetune_runtime.serving.pool import Pool
from edgetune_runtime.states.activation import Spans
from edgetune_runtime.tools.calls import CallReader

from .classification import LabelChoice
from .confidence import Curves
from .routing.router import Route


@dataclass(frozen=True)
class Call:
    """A prepared call: its pool and job, its system prompt, the time to prepare it, and the tokens carried over.

    `entries` are its adapters, and then those of what is carried over, which are loaded in `adapters`; `drafts` reads
    the first one's draft table. `stopped` is why it had to stop before it was prepared, if it had to; the job is then
    empty. `curves` give the confidence, and with `answers_tool` the prompt ends with the result of a tool. With
    `labels` the answer is one of these, and nothing else constrains it.
    """

    pool: Pool | MergedPool
    job: PromptJob
    system: str | None
    prepared_s: float
    adapters: LoadedAdapters
    entries: Entries
    carried: int = 0
    drafts: Callable[[], DraftTable | None] | None = None
    output: OutputSpec | None = None
    constraint: Constraint | None = None
    reader: CallReader | None = None
    past: PastAnswer | None = None
    stopped: str = ""
    route: Route | None = None
    curves: Curves = field(default_factory=dict)
    answers_tool: bool = False
    labels: LabelChoice | None = None

    def lease(self, job: PromptJob | None = None) -> AbstractContextManager[Context]:
        """A context for the call's job, or another one, with its adapters loaded; see `LoadedAdapters.lease`."""
        return self.adapters.lease(self.pool, self.job if job is None else job, self.entries)


@dataclass(frozen=True)
class CarriedState:
    """Tokens whose state is carried over unchanged: the adapters that computed each span, and the system prompt."""

    tokens: Sequence[int]
    spans: Spans
    system: str | None

    @property
    def adapters(self) -> set[str]:
        """The names of all these adapters."""
        return {name for _, names in self.spans for name in names}
