"""The steps of a build that depend on the task: bases, training jobs, methods, and the export. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import methods
from edgetune.prepared import PlannedTraining, Prepared
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import BundleSpec, TrainedAdapter
from edgetune.shipping.exporter import B, Exporter
from edgetune.tasks import Task

if TYPE_CHECKING:
    import torch
    from edgetune_export.adapters.shapes import Folded
    from transformers import PreTrainedModel

    from edgetune.training.job import TrainResult


class Builder(Exporter[B]):
    """Builds and exports recipes of one task; B is the class of its bases.

    `keeps_states`: the runtime has states of prompts, which a bundle can include.
    """

    keeps_states: bool = False

    @abstractmethod
    def check_methods(self, recipe: Recipe) -> None:
        """Raise IncompatibleError that names an adapter whose method or scale does not work here."""

    @abstractmethod
    def describe(self, recipe: Recipe) -> dict[str, Any]:
        """The base's `architecture` and the choices for the `board`, if they are known without downloads.

        Raises the errors of `resolve`.
        """

    @abstractmethod
    def needs(self, recipe: Recipe, tasks: Sequence[Task], out: Path) -> dict[str, Any] | None:
        """Memory and disk space for building `out`, as in `needs.told`; None if there is no prediction."""

    @abstractmethod
    def resolve(self, recipe: Recipe, work: Path, progress: Progress, converter: Path | None) -> tuple[B, Recipe]:
        """The recipe's base, and the recipe with the settings that depend on base and board.

        Raises NotFoundError if there is no such base, IncompatibleError if it is of another type or does not fit,
        VerificationError if a file is damaged, UsageError for a context_length that it does not support.
        """

    @abstractmethod
    def plan(self, tasks: Sequence[Task], base: B, recipe: Recipe, progress: Progress) -> list[PlannedTraining]:
        """A training job per task, tokenized for the base; reports rows that are too long."""

    def prepare(
        self, recipe: Recipe, tasks: Sequence[Task], out: Path, progress: Progress, converter: Path | None
    ) -> Prepared[B]:
        """Everything before the training of the adapters; intermediate files are in `<out>.work`."""
        base, recipe = self.resolve(recipe, out.with_name(f"{out.name}.work"), progress, converter)
        return Prepared(base, recipe, self.plan(tasks, base, recipe, progress))

    @abstractmethod
    def trained(self, planned: PlannedTraining, result: TrainResult, work: Path) -> TrainedAdapter:
        """The adapter trained in `work`, with held-out rows for the parity check."""

    @abstractmethod
    def load_torch(self, base: B, dtype: torch.dtype) -> PreTrainedModel:
        """Load the base into torch."""

    def load_for_export(self, base: B, wanted: BundleSpec, folder: Path, progress: Progress) -> PreTrainedModel:
        """Load the base in float32. If memory is short, its weights may be mapped from a file in `folder`."""
        import torch  # noqa: PLC0415 - only for exports

        return self.load_torch(base, torch.float32)

    def fold(self, adapter: TrainedAdapter, model: PreTrainedModel, shape: str) -> Folded:
        """Fold the adapter into a shape; `model` is the base in float32."""
        return methods.load(adapter.method).fold(adapter.checkpoint(model), shape)
