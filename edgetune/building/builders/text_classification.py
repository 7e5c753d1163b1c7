"""Builds bundles for text classification; each adapter has a head for the labels of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from edgetune_export import backends
from edgetune_export.adapters.fold import find_weights
from edgetune_export.adapters.shapes import Folded, Head, LowRank
from edgetune_export.backends.base import EncoderSource, Source
from edgetune_runtime.bundle import CLASSIFICATION, BaseEntry, sha256_of
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer
from edgetune_runtime.errors import naming
from edgetune_runtime.wording import first_of
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.building.encoder import base as encoder
from edgetune.building.encoder.base import EncoderBase
from edgetune.building.encoder.objective import HEAD_FILE, Classify, Labelled, load_head, tokenize_labelled
from edgetune.building.encoder.verify import verify
from edgetune.common.digests import key_of
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.planning.records import AdapterPlan, BuildPlan
from edgetune.shipping.builder import Builder
from edgetune.shipping.exported import (
    BundleSpec,
    ExportedFormat,
    ParityReport,
    PreparedAdapter,
    TrainedAdapter,
)
from edgetune.tasks.task import Task
from edgetune.training.job import TrainingJob

# Held-out rows per task for the parity check.
PARITY_ROWS = 64


class TextClassification(Builder[EncoderBase]):
    """The base is the Hugging Face folder of an encoder."""

    task = CLASSIFICATION

    def make_base(self, plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> EncoderBase:
        """The encoder with its sizes."""
        assert plan.source is not None
        return encoder.make(plan.source)

    def jobs(
        self, plan: BuildPlan, tasks: Sequence[Task], base: EncoderBase, progress: Progress
    ) -> list[PreparedAdapter]:
        """A training job per task, of rows of tokens with the number of a label."""
        tokenizer, length = EncoderTokenizer(base.tokenizer), plan.recipe.context_length
        prepared = []
        for task in tasks:
            with naming(f"adapter {task.name!r}"):
                train, long_train = tokenize_labelled(task.trained_rows, tokenizer, task.labels, length)
                validation, long_validation = tokenize_labelled(task.choosing, tokenizer, task.labels, length)
            too_long = long_train + long_validation
            if too_long:
                progress.say(f"{task.name}: {len(too_long)} rows are longer than {length} tokens: {first_of(too_long)}")
            planned = plan.adapters[task.name]
            start = planned.start
            job = TrainingJob(
                task.name,
                methods.load(planned.method),
                planned.options,
                planned.training,
                train,
                validation,
                _key(planned, base, train, validation),
                Classify(base.hidden_size, len(task.labels), start),
                start=start,
            )
            probes = [row.tokens for row in spread(validation, PARITY_ROWS)]
            prepared.append(PreparedAdapter(planned, task, job, too_long, probes))
        return prepared

    def load_torch(self, base: EncoderBase, dtype: torch.dtype) -> PreTrainedModel:
        """Load the weights of the base's folder."""
        return encoder.load_torch(base, dtype)

    def source(self, base: EncoderBase, model: PreTrainedModel, work: Path, spec: BundleSpec) -> EncoderSource:
        """The base's weights file for backends; its tokenizer is in the same folder."""
        length, options = base.trained_context_length, spec.format_options
        return EncoderSource(base.path, base.fingerprint, model, work, options, trained_context_length=length)

    def fold(self, adapter: TrainedAdapter, model: PreTrainedModel, shape: str) -> Folded:
        """Fold the adapter, and add its head."""
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
            tokenizer_sha256=sha256_of(base.tokenizer),
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
        return verify(model, adapters, exports, progress)


def _key(planned: AdapterPlan, base: EncoderBase, train: Sequence[Labelled], validation: Sequence[Labelled]) -> str:
    method = planned.spec.method.model_dump(mode="json")
    state = [CLASSIFICATION, base.fingerprint, method, planned.training.model_dump(mode="json"), list(planned.labels)]
    if planned.start is not None:
        state += [sha256_of(find_weights(planned.start)), sha256_of(planned.start / HEAD_FILE)]
    return key_of([*state, len(train)], ((row.tokens, row.label, row.weight) for row in (*train, *validation)))


BUILDER = TextClassification()
