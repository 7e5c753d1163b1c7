"""Builds bundles for text classification; each adapter has a head for the labels of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export.adapters.shapes import Folded, Head, LowRank
from edgetune_export.backends.base import OnnxOptions, Source
from edgetune_runtime.bundle import CLASSIFICATION, BaseEntry, sha256_of
from edgetune_runtime.errors import IncompatibleError, UsageError

from edgetune import methods
from edgetune.encoder import base as encoder
from edgetune.encoder.base import TOKENIZER, EncoderBase
from edgetune.prepared import PlannedTraining, Prepared
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import Checked, ExportedFormat, TrainedAdapter
from edgetune.tasks import Task

from .base import Builder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edgetune.training.job import TrainResult

# Held-out rows per task for the parity check.
PARITY_ROWS = 64


class TextClassification(Builder[EncoderBase]):
    """The base is the Hugging Face folder of an encoder."""

    task = CLASSIFICATION

    def check_methods(self, recipe: Recipe) -> None:
        """Raise IncompatibleError that names an adapter whose method does not work with encoders."""
        for name, spec in recipe.adapters.items():
            method = methods.load(spec.method.name)
            if LowRank.shape not in method.shapes(spec.method.options) or not method.takes_encoders:
                message = f"adapter {name!r}: {method.name} does not work with encoders"
                raise IncompatibleError(message, "use another method, such as lora")

    def describe(self, recipe: Recipe) -> dict[str, Any]:
        """The base's `architecture`."""
        return {"architecture": encoder.describe(recipe)}

    def needs(self, recipe: Recipe, tasks: Sequence[Task], out: Path) -> dict[str, Any] | None:
        """None, because encoders are small."""
        return None

    def resolve(
        self, recipe: Recipe, work: Path, progress: Progress, converter: Path | None
    ) -> tuple[EncoderBase, Recipe]:
        """The base, and the recipe with a context_length that the base supports."""
        base = encoder.resolve(recipe)
        length = min(recipe.context_length, base.trained_context_length)
        return base, recipe.model_copy(update={"context_length": length})

    def plan(
        self, tasks: Sequence[Task], base: EncoderBase, recipe: Recipe, progress: Progress
    ) -> list[PlannedTraining]:
        """A training job per task, tokenized for the base; reports rows that are too long."""
        from edgetune.encoder.prepare import plan_trainings  # noqa: PLC0415 - torch

        return plan_trainings(tasks, base, recipe.context_length, progress)

    def prepare(
        self, recipe: Recipe, tasks: Sequence[Task], out: Path, progress: Progress, converter: Path | None
    ) -> Prepared[EncoderBase]:
        """First raises UsageError for a task with fewer than two labels."""
        for task in tasks:
            if len(task.labels) < 2:
                found = ", ".join(map(repr, task.labels)) or "none"
                message = f"adapter {task.name!r} needs rows of at least 2 labels to tell apart, there is: {found}"
                raise UsageError(message, "give rows of text and label")
        return super().prepare(recipe, tasks, out, progress, converter)

    def trained(self, planned: PlannedTraining, result: TrainResult, work: Path) -> TrainedAdapter:
        """The adapter trained in `work`, with rows for the parity check."""
        return planned.trained(result, work, [row.tokens for row in planned.job.validation[:PARITY_ROWS]])

    def load_torch(self, base: EncoderBase, dtype: torch.dtype) -> PreTrainedModel:
        """Load the weights of the base's folder."""
        return encoder.load_torch(base, dtype)

    def source(self, base: EncoderBase, model: PreTrainedModel, work: Path, onnx: OnnxOptions) -> Source:
        """The base's weights file for backends; its tokenizer is in the same folder."""
        from edgetune_export.backends.onnx.encoder import EncoderSource  # noqa: PLC0415 - torch

        trained = base.trained_context_length
        return EncoderSource(base.path, base.fingerprint, model, work, onnx, trained_context_length=trained)

    def fold(self, adapter: TrainedAdapter, model: PreTrainedModel, shape: str) -> Folded:
        """Fold the adapter, and add its head."""
        from edgetune.encoder.objective import load_head  # noqa: PLC0415 - torch

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
            quantization="f32" if source.onnx.weights == "fp32" else "int8",
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
    ) -> Checked:
        """Compare the logits of the labels, and the pooled layer of the plain base."""
        from edgetune.encoder.verify import verify  # noqa: PLC0415 - torch

        return verify(model, adapters, exports, progress)


BUILDER = TextClassification()
