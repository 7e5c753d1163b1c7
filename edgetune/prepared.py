"""A prepared build: the base, the resolved recipe, and a training job per adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from edgetune_export import backends
from edgetune_runtime.decoding.drafts import DraftTable
from edgetune_runtime.decoding.output import OutputSpec

from .recipe.model import Recipe
from .shipping.exported import BuildBase, TrainedAdapter
from .tasks import Task
from .tokenization import TooLong

if TYPE_CHECKING:
    from .training.job import TrainingJob, TrainResult

B = TypeVar("B", bound=BuildBase)

# Validation rows per task from which the golden answer is chosen.
GOLDEN_ROWS = 8


@dataclass(frozen=True)
class PlannedTraining:
    """A task, its training job, and the rows left out; `choices` are figures of settings chosen by the build.

    `output` constrains the adapter's answers, and `draft` is its draft table.
    """

    task: Task
    job: TrainingJob[Any]
    too_long: TooLong
    choices: Mapping[str, Any] = field(default_factory=dict)
    output: OutputSpec | None = None
    draft: DraftTable | None = None

    def figures(self, result: TrainResult) -> dict[str, Any]:
        """The figures of the result and of the choices, as JSON values."""
        return {**result.figures(), **self.choices}

    def trained(
        self,
        result: TrainResult,
        work: Path,
        probes: Sequence[Sequence[int]],
        *,
        prompt_lengths: Sequence[int] = (),
        texts: Sequence[str] = (),
    ) -> TrainedAdapter:
        """The adapter trained in `work`; the parity check uses `probes` and `texts`."""
        spec = self.task.spec
        return TrainedAdapter(
            name=self.job.name,
            folder=work / self.job.name / "adapter",
            method=spec.method.name,
            options=spec.method.options,
            probes=probes,
            prompt_lengths=prompt_lengths,
            scale=spec.scale,
            system=spec.system,
            metric=self.task.metric,
            labels=self.task.labels,
            merged=spec.merged,
            dtypes={target: spec.dtype_in(target) for target in backends.names()},
            training={**self.figures(result), "history": result.curve()},
            texts=texts,
            output=self.output,
            draft=self.draft,
            golden_rows=self.task.validation[:GOLDEN_ROWS] if spec.golden else (),
        )


@dataclass(frozen=True)
class Prepared(Generic[B]):
    """The base, the recipe with all choices, and the trainings; `domain` has the figures of continued pretraining."""

    base: B
    recipe: Recipe
    trainings: Sequence[PlannedTraining]
    domain: Mapping[str, Any] = field(default_factory=dict)
