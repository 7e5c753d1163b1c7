"""Builds bundles for text generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.base import Source
from edgetune_runtime.bundle import GENERATION, BaseEntry
from edgetune_runtime.formats.gguf_file import digest_of_chat_template, digest_of_tokenizer
from edgetune_runtime.formats.gguf_sizes import kv_values_per_token
from edgetune_runtime.threads import machine

from edgetune import bases
from edgetune.bases import Base, BaseSource, trained_context_length
from edgetune.common.progress import Progress
from edgetune.planning.on_device import base_bytes
from edgetune.planning.records import BuildPlan, PlannedBuild
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_of
from edgetune.shipping.builder import Builder
from edgetune.shipping.exported import (
    BundleSpec,
    ExportedFormat,
    Figures,
    ParityReport,
    Prepared,
    PreparedAdapter,
    TrainedAdapter,
)
from edgetune.shipping.verify import compare_formats, verify
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edgetune.training.job import TrainResult

# Held-out rows per adapter for the parity check.
PARITY_ROWS = 12
# Rows whose texts are for comparing tokenizers.
TEXT_ROWS = 100


class TextGeneration(Builder[Base]):
    """The base is a GGUF file, from which every format is made."""

    task = GENERATION
    # Every base is quantized and tokenized by llama.cpp.
    packages = ("llama-cpp-python",)
    keeps_states = True

    def find(self, recipe: Recipe, *, download: bool = False) -> BaseSource | None:
        """The GGUF file, or the Hugging Face folder to convert."""
        return bases.find(recipe, download=download)

    def shapes(self, recipe: Recipe) -> dict[str, dict[str, str]]:
        """The shape of each adapter in each format."""
        return shapes_of(recipe)

    def make_base(self, plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> Base:
        """The base, converted and quantized in `work`."""
        from edgetune.building.decoder.prepare import make_base  # noqa: PLC0415 - torch

        return make_base(plan, work, progress, converter)

    def jobs(self, plan: BuildPlan, tasks: Sequence[Task], base: Base, progress: Progress) -> list[PreparedAdapter]:
        """A training job per task, tokenized for the base; reports rows that are too long."""
        from edgetune.building.decoder.prepare import training_jobs  # noqa: PLC0415 - torch

        return training_jobs(plan, tasks, base, progress)

    def base_to_train(self, planned: PlannedBuild, work: Path, progress: Progress, converter: Path | None) -> Base:
        """The base after continued pretraining, if the recipe has a domain."""
        from edgetune.building.decoder.prepare import base_to_train  # noqa: PLC0415 - torch

        return base_to_train(planned, work, progress, converter)

    def prepare(self, planned: PlannedBuild, base: Base, work: Path, progress: Progress) -> Prepared[Base]:
        """Also makes draft tables, and chooses target modules."""
        from edgetune.building.decoder.prepare import prepare  # noqa: PLC0415 - torch

        return prepare(planned, base, work, progress)

    def trained(self, prepared: PreparedAdapter, result: TrainResult, work: Path) -> TrainedAdapter:
        """The adapter trained in `work`, with rows and texts for the parity check."""
        probes = prepared.job.validation[:PARITY_ROWS]
        return prepared.trained(
            result,
            work,
            [example.tokens for example in probes],
            prompt_lengths=[example.prompt_length for example in probes],
            texts=[text for row in prepared.task.validation[:TEXT_ROWS] for text in _texts(row)],
        )

    def load_torch(self, base: Base, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dequantized weights of the base's file."""
        return bases.load_torch(base, dtype)

    def load_for_export(self, base: Base, spec: BundleSpec, folder: Path, progress: Progress) -> PreTrainedModel:
        """Load the base in float32; if memory is short, map its weights from a file in `folder`."""
        import torch  # noqa: PLC0415 - only for exports

        return bases.load_torch(base, torch.float32, mapped=_file_to_map(base, spec, folder, progress))

    def source(self, base: Base, model: PreTrainedModel, work: Path, spec: BundleSpec) -> Source:
        """The base's file for backends."""
        formats = spec.format_options, spec.calibration
        return Source(base.path, base.fingerprint, model, work, *formats, base.quantization)

    def base_entry(self, base: Base, source: Source, files: Mapping[str, str]) -> BaseEntry:
        """The base's entry in the manifest, from the header of its file."""
        metadata, arch = base.header.metadata, base.header.architecture
        return BaseEntry(
            name=base.name if "/" not in base.name else Path(base.name).name,
            fingerprint=base.fingerprint,
            architecture=arch,
            quantization=base.quantization,
            parameters=base.header.parameters,
            trained_context_length=trained_context_length(base.header),
            layers=int(metadata[f"{arch}.block_count"]),
            kv_values_per_token=kv_values_per_token(base.header),
            tokenizer_sha256=digest_of_tokenizer(base.header),
            chat_template_sha256=digest_of_chat_template(base.header),
            files=files,
            domain=base.domain,
        )

    def verify(
        self,
        base: Base,
        model: PreTrainedModel,
        adapters: Sequence[TrainedAdapter],
        exports: Sequence[ExportedFormat],
        progress: Progress,
    ) -> ParityReport:
        """Compare logits after every token, greedy answers and tokenizers."""
        return verify(base, model, adapters, exports, progress)

    def compare_formats(
        self, adapters: Sequence[TrainedAdapter], exports: Sequence[ExportedFormat], progress: Progress
    ) -> Mapping[str, Figures]:
        """Parity of the first format's base with that of each other format."""
        return compare_formats(adapters, exports, progress)


def _file_to_map(base: Base, spec: BundleSpec, folder: Path, progress: Progress) -> Path | None:
    """The file to map the base's weights from, because memory is short; None if it is not."""
    weights_mb, free_mb = BaseShape.of_header(base.header).loaded_parameters * 4 / 1e6, machine.free_mb()
    needed_mb = weights_mb + max(
        backends.format_of(target).export_mb(
            base_bytes(base.header, target), base.header.parameters, spec.format_options
        )
        for target in spec.targets
    )
    if free_mb is None or free_mb >= needed_mb:
        return None
    progress.say(f"mapping the base's weights from disk, because only {free_mb:,.0f} MB of memory are free")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "weights.f32"


def _texts(row: TaskRow) -> list[str]:
    parts = [row.text, row.completion, *(message["content"] for message in row.messages or ())]
    return [part for part in parts if part]


BUILDER = TextGeneration()
