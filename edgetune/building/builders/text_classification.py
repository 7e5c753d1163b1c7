"""Builds bundles for text classification; each adapter has a head for the labels of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_export import backends
from edgetune_export.adapters.shapes import Folded, Head, LowRank
from edgetune_export.backends.base import EncoderSource, Source
from edgetune_runtime.bundle import CLASSIFICATION, BaseEntry, sha256_of
from edgetune_runtime.errors import IncompatibleError, UsageError

from edgetune import methods
from edgetune.bases import BaseSource
from edgetune.building.encoder import base as encoder
from edgetune.building.encoder.base import TOKENIZER, EncoderBase
from edgetune.common.progress import Progress
from edgetune.planning.records import BuildPlan, PlannedBuild
from edgetune.recipe.model import Recipe
from edgetune.shipping.builder import Builder
from edgetune.shipping.exported import (
    BundleSpec,
    ExportedFormat,
    ParityReport,
    PreparedAdapter,
    TrainedAdapter,
)
from edgetune.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edgetune.training.job import TrainResult

# Held-out rows per task for the parity check.
PARITY_ROWS = 64


class TextClassification(Builder[EncoderBase]):
    """The base is the Hugging Face folder of an encoder."""

    task = CLASSIFICATION

    def find(self, recipe: Recipe, *, download: bool = False) -> BaseSource | None:
        """The folder of the encoder."""
        return encoder.find(recipe, download=download)

    def shapes(self, recipe: Recipe) -> dict[str, dict[str, str]]:
        """Low rank in each format; IncompatibleError names an adapter whose method does not work with encoders."""
        for name, spec in recipe.adapters.items():
            method = methods.load(spec.method.name)
            if LowRank.shape not in method.shapes(spec.method.options) or not method.takes_encoders:
                message = f"adapter {name!r}: {method.name} does not work with encoders"
                raise IncompatibleError(message, "use another method, such as lora")
        return {name: dict.fromkeys(recipe.targets, LowRank.shape) for name in recipe.adapters}

    def make_base(self, plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> EncoderBase:
        """The encoder with its sizes."""
        assert plan.source is not None
        return encoder.make(plan.source)

    def jobs(
        self, plan: BuildPlan, tasks: Sequence[Task], base: EncoderBase, progress: Progress
    ) -> list[PreparedAdapter]:
        """A training job per task, tokenized for the base; reports rows that are too long."""
        from edgetune.building.encoder.prepare import training_jobs  # noqa: PLC0415 - torch

        return training_jobs(plan, tasks, base, progress)

    def base_to_train(
        self, planned: PlannedBuild, work: Path, progress: Progress, converter: Path | None
    ) -> EncoderBase:
        """First raises UsageError for a task with fewer than two labels."""
        for task in planned.tasks:
            if len(task.labels) < 2:
                labels = ", ".join(map(repr, task.labels)) or "none"
                message = f"adapter {task.name!r} needs rows of at least 2 labels to tell apart, there is: {labels}"
                raise UsageError(message, "give rows of text and label")
        return super().base_to_train(planned, work, progress, converter)

    def trained(self, prepared: PreparedAdapter, result: TrainResult, work: Path) -> TrainedAdapter:
        """The adapter trained in `work`, with rows for the parity check."""
        return prepared.trained(result, work, [row.tokens for row in prepared.job.validation[:PARITY_ROWS]])

    def load_torch(self, base: EncoderBase, dtype: torch.dtype) -> PreTrainedModel:
        """Load the weights of the base's folder."""
        return encoder.load_torch(base, dtype)

    def source(self, base: EncoderBase, model: PreTrainedModel, work: Path, spec: BundleSpec) -> EncoderSource:
        """The base's weights file for backends; its tokenizer is in the same folder."""
        length, options = base.trained_context_length, spec.format_options
        return EncoderSource(base.path, base.fingerprint, model, work, options, trained_context_length=length)

    def fold(self, adapter: TrainedAdapter, model: PreTrainedModel, shape: str) -> Folded:
        """Fold the adapter, and add its head."""
        from edgetune.building.encoder.objective import load_head  # noqa: PLC0415 - torch

        folded = super().fold(adapter, model, shape)
        assert isinstance(folded, LowRank)
        head = load_head(adapter.folder)
        return replace(folded, head=Head(head.weight.detach().numpy(), head.bias.detach().numpy()))

    def base_entry(self, base: EncoderBase, source: Source, files: Mapping[str, str]) -> BaseEntry:
        """The base's entry in the manifest, from its config.json."""
        assert source.model is not None
        return BaseEntry(
            name=Path(base.name).name,
            fingerprint=base.fingerprint,
            architecture=base.architecture,
            quantization=backends.load(next(iter(files)), self.task).weight_type(source),
            parameters=sum(parameter.numel() for parameter in source.model.parameters()),
            trained_context_length=base.trained_context_length,
            layers=base.layers,
            kv_values_per_token=0,
            tokenizer_sha256=sha256_of(base.folder / TOKENIZER),
            chat_template_sha256="",
            files=files,
        )

    def verify(
        self,
        base: EncoderBase,
        model: PreTrainedModel,
        adapters: Sequence[TrainedAdapter],
        exports: Sequence[ExportedFormat],
        progress: Progress,
    ) -> ParityReport:
        """Compare the logits of the labels, and the pooled layer of the plain base."""
        from edgetune.building.encoder.verify import verify  # noqa: PLC0415 - torch

        return verify(model, adapters, exports, progress)


BUILDER = TextClassification()
