"""Builds bundles for text generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_devices.fit import kv_values_per_token
from edgetune_export import backends
from edgetune_export.backends.base import OnnxOptions, Source
from edgetune_runtime.bundle import GENERATION, BaseEntry
from edgetune_runtime.formats.gguf_file import digest_of_chat_template, digest_of_tokenizer
from edgetune_runtime.threads import machine

from edgetune import bases, plan
from edgetune import needs as build_needs
from edgetune.bases import Base, check_context, trained_context_length
from edgetune.data import TaskRow
from edgetune.domain.texts import window_of
from edgetune.prepared import PlannedTraining, Prepared
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import BundleSpec, Checked, ExportedFormat, Figures, TrainedAdapter
from edgetune.shipping.verify import compare_formats, verify
from edgetune.targets import check_shapes
from edgetune.tasks import Task

from .base import Builder

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

    def check_methods(self, recipe: Recipe) -> None:
        """Raise IncompatibleError that names an adapter whose method does not work with a target or a scale."""
        check_shapes(recipe)

    def describe(self, recipe: Recipe) -> dict[str, Any]:
        """The base's `architecture` and the choices for the `board`."""
        header = bases.describe(recipe)
        if header is None:
            return {"board": recipe.device}
        check_context(recipe, trained_context_length(header))
        window_of(recipe, header)
        chosen = plan.choose_for(recipe, header)
        return {"architecture": header.architecture, "board": None if chosen is None else chosen.reason}

    def needs(self, recipe: Recipe, tasks: Sequence[Task], out: Path) -> dict[str, Any] | None:
        """Memory and disk space for building `out`; None if the base must be downloaded first."""
        return build_needs.told(recipe, tasks, build_needs.header_of(recipe), out)

    def resolve(self, recipe: Recipe, work: Path, progress: Progress, converter: Path | None) -> tuple[Base, Recipe]:
        """The base, converted and quantized in `work`, and the recipe with the choices for its board."""
        from edgetune.decoder.prepare import resolve  # noqa: PLC0415 - torch

        return resolve(recipe, work, progress, converter)

    def plan(self, tasks: Sequence[Task], base: Base, recipe: Recipe, progress: Progress) -> list[PlannedTraining]:
        """A training job per task, tokenized for the base; reports rows that are too long."""
        from edgetune.decoder.prepare import plan_trainings  # noqa: PLC0415 - torch

        return plan_trainings(tasks, base, recipe.context_length, progress)

    def prepare(
        self, recipe: Recipe, tasks: Sequence[Task], out: Path, progress: Progress, converter: Path | None
    ) -> Prepared[Base]:
        """Also reports what the build needs, runs continued pretraining, and chooses target modules."""
        from edgetune.decoder.prepare import prepare  # noqa: PLC0415 - torch

        return prepare(recipe, tasks, out, progress, converter)

    def trained(self, planned: PlannedTraining, result: TrainResult, work: Path) -> TrainedAdapter:
        """The adapter trained in `work`, with rows and texts for the parity check."""
        probes = planned.job.validation[:PARITY_ROWS]
        return planned.trained(
            result,
            work,
            [example.tokens for example in probes],
            prompt_lengths=[example.prompt_length for example in probes],
            texts=[text for row in planned.task.validation[:TEXT_ROWS] for text in _texts(row)],
        )

    def load_torch(self, base: Base, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dequantized weights of the base's file."""
        return bases.load_torch(base, dtype)

    def load_for_export(self, base: Base, wanted: BundleSpec, folder: Path, progress: Progress) -> PreTrainedModel:
        """Load the base in float32; if memory is short, map its weights from a file in `folder`."""
        import torch  # noqa: PLC0415 - only for exports

        return bases.load_torch(base, torch.float32, mapped=_file_to_map(base, wanted, folder, progress))

    def source(self, base: Base, model: PreTrainedModel, work: Path, onnx: OnnxOptions) -> Source:
        """The base's file for backends."""
        return Source(base.path, base.fingerprint, model, work, onnx, base.quantization)

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
    ) -> Checked:
        """Compare logits after every token, greedy answers and tokenizers."""
        return verify(base, model, adapters, exports, progress)

    def compare_formats(
        self, adapters: Sequence[TrainedAdapter], exports: Sequence[ExportedFormat], progress: Progress
    ) -> Mapping[str, Figures]:
        """Parity of the first format's base with that of each other format."""
        return compare_formats(adapters, exports, progress)


def _file_to_map(base: Base, wanted: BundleSpec, folder: Path, progress: Progress) -> Path | None:
    """The file to map the base's weights from, because memory is short; None if it is not."""
    weights_mb, free_mb = base.header.parameters * 4 / 1e6, machine.free_mb()
    sizes = base.path.stat().st_size, base.header.parameters, wanted.onnx.weights
    needed_mb = weights_mb + max(backends.format_of(target).export_mb(*sizes) for target in wanted.targets)
    if free_mb is None or free_mb >= needed_mb:
        return None
    progress.say(f"mapping the base's weights from disk, because only {free_mb:,.0f} MB of memory are free")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "weights.f32"


def _texts(row: TaskRow) -> list[str]:
    parts = [row.text, row.completion, *(message["content"] for message in row.messages or ())]
    return [part for part in parts if part]


BUILDER = TextGeneration()
