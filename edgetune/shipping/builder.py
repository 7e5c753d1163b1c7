"""The steps of a build that depend on the task: the base, training jobs, and the export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic

import torch
from edgetune_export.adapters.shapes import Folded
from edgetune_export.backends.base import Source
from edgetune_runtime.bundle import BaseEntry
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.common.progress import Progress
from edgetune.planning.records import BuildPlan, PlannedBuild
from edgetune.tasks.task import Task

from .exported import B, BundleSpec, ExportedFormat, Figures, ParityReport, Prepared, PreparedAdapter, TrainedAdapter


class Builder(ABC, Generic[B]):
    """Builds and exports recipes of one task; B is the class of its bases.

    The manifest records `packages` besides those of the formats. `keeps_states`: the runtime has states of prompts,
    which a bundle can include.
    """

    task: str
    packages: tuple[str, ...] = ()
    keeps_states: bool = False

    @abstractmethod
    def make_base(self, plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> B:
        """The base that the plan found, converted and quantized in `work`.

        Raises VerificationError if a file is damaged, IncompatibleError if it turns out too large for the board.
        """

    @abstractmethod
    def jobs(self, plan: BuildPlan, tasks: Sequence[Task], base: B, progress: Progress) -> list[PreparedAdapter]:
        """A training job per task, tokenized for the base; reports rows that are too long."""

    def base_to_train(self, planned: PlannedBuild, work: Path, progress: Progress, converter: Path | None) -> B:
        """The base that the adapters are trained on; intermediate files are in `work`."""
        return self.make_base(planned.plan, work, progress, converter)

    def prepare(self, planned: PlannedBuild, base: B, work: Path, progress: Progress) -> Prepared[B]:
        """Everything else before the training of the adapters; `base` is that of `base_to_train`."""
        return Prepared(base, planned.plan, self.jobs(planned.plan, planned.tasks, base, progress))

    @abstractmethod
    def load_torch(self, base: B, dtype: torch.dtype) -> PreTrainedModel:
        """Load the base into torch."""

    def load_for_export(self, base: B, spec: BundleSpec, folder: Path, progress: Progress) -> PreTrainedModel:
        """Load the base in float32. If memory is short, its weights may be mapped from a file in `folder`."""
        return self.load_torch(base, torch.float32)

    @abstractmethod
    def source(self, base: B, model: PreTrainedModel, work: Path, spec: BundleSpec) -> Source:
        """The base for backends; `model` is the base in float32."""

    def fold(self, adapter: TrainedAdapter, model: PreTrainedModel, shape: str) -> Folded:
        """Fold the adapter into a shape; `model` is the base in float32."""
        return methods.load(adapter.plan.method).fold(adapter.checkpoint(model), shape)

    @abstractmethod
    def base_entry(self, base: B, source: Source, files: Mapping[str, str]) -> BaseEntry:
        """The base's entry in the manifest, without types and parity; `files` are its files by format."""

    @abstractmethod
    def verify(
        self,
        base: B,
        model: PreTrainedModel,
        adapters: Sequence[TrainedAdapter],
        exports: Sequence[ExportedFormat],
        progress: Progress,
    ) -> ParityReport:
        """Compare every format with torch; VerificationError names the adapter, or the base, that differs too much."""

    def compare_formats(
        self, adapters: Sequence[TrainedAdapter], exports: Sequence[ExportedFormat], progress: Progress
    ) -> Mapping[str, Figures]:
        """Parity of the first format's base with that of each other format, by pair, such as `gguf/onnx`."""
        return {}
