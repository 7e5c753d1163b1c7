"""The types of a build after its plan: adapters as prepared, trained and written, formats as exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from edgetune_export import backends
from edgetune_export.backends.format import OptionsByFormat
from edgetune_runtime.bundle import RoutedCall
from edgetune_runtime.decoding.drafts import DraftTable
from edgetune_runtime.inference.routing.classifier import PromptClassifier
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.common.spread import spread
from edgetune.planning.records import AdapterPlan, BuildPlan
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task
from edgetune.training.job import TrainingJob, TrainResult

from .existing import ExistingBundle

Figures = Mapping[str, float]
"""Parity by figure, such as `kl` and `top1`, as in the manifest."""

# Validation rows per task from which the golden answer is chosen.
GOLDEN_ROWS = 4


class BuildBase(Protocol):
    """What all bases of builds have in common."""

    @property
    def name(self) -> str:
        """The base's name in the recipe."""

    @property
    def path(self) -> Path:
        """The file with its weights."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of that file."""


B = TypeVar("B", bound=BuildBase)


@dataclass(frozen=True)
class TrainedRouter:
    """A router: a classifier for each kind of call, and what the manifest says of it (see `RouterEntry`)."""

    classifiers: Mapping[str, PromptClassifier]
    calls: Mapping[str, RoutedCall]
    below: str


@dataclass(frozen=True)
class BundleSpec:
    """The bundle to write: its name, its defaults, its formats, and the recipe and the plan that it stores.

    `calibration` are token rows of the tasks, which a format may quantize the base with. `existing` is the bundle that
    the adapters are added to, if there is one.
    """

    name: str
    context_length: int
    threads: int | None = None
    targets: tuple[str, ...] = (backends.DEFAULT,)
    format_options: OptionsByFormat = field(default_factory=dict)
    calibration: Sequence[Sequence[int]] = ()
    merged_quantization: str | None = None
    ships_states: bool = False
    warms: bool = False
    router: TrainedRouter | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    existing: ExistingBundle | None = None


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter before its training: its plan and rows, its training job, and where the rows left out of it are.

    For `probes`, `prompt_lengths`, `texts` and `fold_of` see `TrainedAdapter`. `draft` is its draft table, `choices`
    are figures of settings that the build has chosen.
    """

    plan: AdapterPlan
    task: Task
    job: TrainingJob[Any]
    too_long: Sequence[str]
    probes: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int] = ()
    texts: Sequence[str] = ()
    draft: DraftTable | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    fold_of: str | None = None

    def figures(self, result: TrainResult) -> dict[str, Any]:
        """The figures of the result and of the choices, as JSON values."""
        return {**result.figures(), **self.choices}

    def trained(self, result: TrainResult, work: Path) -> TrainedAdapter:
        """The adapter trained in `work`."""
        return TrainedAdapter(
            self.plan,
            work / self.plan.name / "adapter",
            self.probes,
            prompt_lengths=self.prompt_lengths,
            texts=self.texts,
            draft=self.draft,
            golden_rows=spread(self.task.validation, GOLDEN_ROWS) if self.plan.spec.golden and not self.fold_of else (),
            scope_rows=self.task.validation if self.plan.spec.out_of_scope is not None else (),
            compared_rows=self.task.compared_rows,
            confidence_rows=self.task.confidence_rows,
            training={**self.figures(result), "history": result.curve()},
            fold_of=self.fold_of,
        )


@dataclass(frozen=True)
class Prepared(Generic[B]):
    """The base, the plan with all choices, and the adapters; `domain` has the figures of continued pretraining."""

    base: B
    plan: BuildPlan
    adapters: Sequence[PreparedAdapter]
    domain: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter to export, with its plan.

    `folder` is what its method wrote. `probes` are token rows for the parity check; the first of them, up to their
    `prompt_lengths`, are also answered. `texts` are texts of the task for comparing tokenizers. The golden answer is to
    one of `golden_rows`; `scope_rows` choose what is out of scope, and the confidence of answers is fitted on
    `confidence_rows`, both also by how similar they are to `compared_rows`. `training` are figures for the manifest.

    With `fold_of`, it does not ship: its answers to the rows of a fold count as those of the adapter of this name.
    """

    plan: AdapterPlan
    folder: Path
    probes: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int] = ()
    texts: Sequence[str] = ()
    draft: DraftTable | None = None
    golden_rows: Sequence[TaskRow] = ()
    scope_rows: Sequence[TaskRow] = ()
    compared_rows: Sequence[TaskRow] = ()
    confidence_rows: Sequence[TaskRow] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    fold_of: str | None = None

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.plan.name

    @property
    def whole(self) -> str:
        """The name of the adapter that ships and was trained on all rows: its own, or that of which it is a fold."""
        return self.fold_of or self.name

    def checkpoint(self, base: PreTrainedModel) -> methods.Checkpoint:
        """The trained checkpoint with its base in float32."""
        return methods.Checkpoint(self.name, self.folder, base, self.plan.options, self.plan.spec.scale)


@dataclass(frozen=True)
class WrittenAdapter:
    """The file of an adapter in one format, and its number of values in each type.

    `error` is the share of the trained change that the file leaves out, `invocation` the tokens that activate it,
    `prefix_tokens` the number of positions that it occupies, and `modules_by_rank` the number of modules of each rank
    of a low-rank one. A merged model has the `quantization` that was requested
    for it, and its own `weight_type` (see `ExportedFormat`): that to which its weights were rounded, if it is coarser.
    """

    file: Path
    values_by_type: Mapping[str, int]
    error: float = 0.0
    invocation: tuple[int, ...] = ()
    prefix_tokens: int = 0
    modules_by_rank: Mapping[int, int] = field(default_factory=dict)
    quantization: str | None = None
    weight_type: str = ""


@dataclass(frozen=True)
class ExportedFormat:
    """The files of one format: the base, its number of values in each type, and the adapters by name.

    `weight_type` is the type that determines the tolerance of the parity check (see `Backend.weight_type`).
    """

    backend: str
    base: Path
    values_by_type: Mapping[str, int]
    adapters: Mapping[str, WrittenAdapter]
    weight_type: str


@dataclass(frozen=True)
class ParityReport:
    """Parity of the base by format, and of the adapters by format and name."""

    base: Mapping[str, Figures]
    adapters: Mapping[str, Mapping[str, Figures]]
