"""Builds bundles for text generation: makes the base, continues its pretraining, chooses modules, compares exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from edgetune_export import backends
from edgetune_export.adapters.fold import find_weights
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.base import Source
from edgetune_runtime.bundle import GENERATION, BaseEntry, sha256_of
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.gguf.llama import check_loads
from edgetune_runtime.errors import naming
from edgetune_runtime.formats.gguf_file import digest_of_chat_template, digest_of_tokenizer
from edgetune_runtime.formats.gguf_sizes import kv_values_per_token
from edgetune_runtime.threads import machine
from edgetune_runtime.wording import first_of
from transformers import PreTrainedModel

from edgetune import bases, methods
from edgetune.bases import Base, trained_context_length
from edgetune.building.decoder.importance import requested_importance
from edgetune.building.domain import continued as domain
from edgetune.building.outputs.drafts import draft_of
from edgetune.building.outputs.resolve import write_inferred
from edgetune.building.placement import choose as placement
from edgetune.common.digests import key_of
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.methods import MethodOptions
from edgetune.methods.lora import LoraOptions
from edgetune.objectives.example import Example
from edgetune.planning.adapters import with_options
from edgetune.planning.on_device import base_bytes, check_fit
from edgetune.planning.records import AdapterPlan, BuildPlan, PlannedBuild
from edgetune.shipping.builder import Builder
from edgetune.shipping.exported import (
    BundleSpec,
    Prepared,
    PreparedAdapter,
)
from edgetune.shipping.verify import compare_formats, verify
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task
from edgetune.training.hardware import processes
from edgetune.training.job import TrainingJob
from edgetune.training.jobs import train_all

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

    def make_base(self, plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> Base:
        """The base, converted and quantized in `work`; VerificationError also if llama.cpp cannot load it."""
        assert plan.source is not None
        base = bases.make(
            plan.source,
            plan.base.quantization,
            work=work / "base",
            progress=progress,
            converter=converter,
            importance=requested_importance(plan.recipe, progress),
        )
        # The export would find that only after hours of training.
        check_loads(base.path)
        # The plan has a predicted header if the base is a folder.
        check_fit(plan, base.header)
        return base

    def jobs(self, plan: BuildPlan, tasks: Sequence[Task], base: Base, progress: Progress) -> list[PreparedAdapter]:
        """A training job per task, of rows of tokens."""
        with closing(GgufTokenizer(base.path)) as tokenizer:
            return [_job(plan, task, base, tokenizer, progress) for task in tasks]

    def base_to_train(self, planned: PlannedBuild, work: Path, progress: Progress, converter: Path | None) -> Base:
        """The base after continued pretraining, if the recipe has a domain."""
        with processes().main_process_first():
            base = self.make_base(planned.plan, work, progress, converter)
        if planned.texts is None:
            return base
        # Report errors in the adapters' rows before hours of training.
        self.jobs(planned.plan, planned.tasks, base, Progress(quiet=True))
        load = partial(bases.load_torch, base)
        trainer = partial(train_all, base=base.name, load=load, work=work, progress=progress)
        return domain.continued(planned.plan.recipe, planned.texts, base, work, train_all=trainer, progress=progress)

    def prepare(self, planned: PlannedBuild, base: Base, work: Path, progress: Progress) -> Prepared[Base]:
        """Also writes inferred outputs, makes draft tables, and chooses target modules."""
        plan = planned.plan
        for task in planned.tasks:
            if task.spec.output is not None and task.spec.output.is_auto:
                write_inferred(task.name, plan.adapters[task.name].output, work / "output", progress)
        with closing(GgufTokenizer(base.path)) as tokenizer:
            adapters = [_job(plan, task, base, tokenizer, progress) for task in planned.tasks]
            adapters = [_with_draft(item, base, tokenizer, plan.recipe.targets[0], progress) for item in adapters]
        adapters = [_placed(item, base, plan, work, progress) for item in adapters]
        plan = plan.with_adapters({item.plan.name: item.plan for item in adapters})
        plot = {"plot": str(work / domain.NAME / "training.png")} if base.domain else {}
        return Prepared(base, plan, adapters, {**base.domain, **plot})

    def load_torch(self, base: Base, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dequantized weights of the base's file."""
        return bases.load_torch(base, dtype)

    def load_for_export(self, base: Base, spec: BundleSpec, folder: Path, progress: Progress) -> PreTrainedModel:
        """Load the base in float32; if memory is short, map its weights from a file in `folder`."""
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

    verify = staticmethod(verify)
    compare_formats = staticmethod(compare_formats)


def _job(plan: BuildPlan, task: Task, base: Base, tokenizer: GgufTokenizer, progress: Progress) -> PreparedAdapter:
    planned = plan.adapters[task.name]
    method = methods.load(planned.method)
    capacity = plan.recipe.context_length - method.prefix_tokens(planned.options)
    with naming(f"adapter {task.name!r}"):
        train, validation, too_long = task.tokenize(tokenizer, capacity)
        options = method.prepared(planned.options, tokenizer, (*train, *validation))
    if too_long:
        progress.say(f"{task.name}: {len(too_long)} rows are longer than {capacity} tokens: {first_of(too_long)}")
    planned = _with_options(planned, options)
    job = TrainingJob(
        task.name,
        method,
        planned.options,
        planned.training,
        train,
        validation,
        _key(planned, base, train, validation),
        method.objective(planned.options),
        base.path if planned.on_grid else None,
        planned.start,
    )
    probes = spread(validation, PARITY_ROWS)
    return PreparedAdapter(
        planned,
        task,
        job,
        too_long,
        [example.tokens for example in probes],
        prompt_lengths=[example.prompt_length for example in probes],
        texts=[text for row in spread(task.validation, TEXT_ROWS) for text in _texts(row)],
    )


def _placed(item: PreparedAdapter, base: Base, plan: BuildPlan, work: Path, progress: Progress) -> PreparedAdapter:
    """The same with modules and rank chosen, if the recipe has `target_modules: auto`."""
    options, folder = item.job.options, work / "placement"
    if not isinstance(options, LoraOptions) or not options.is_auto:
        return item
    load = partial(bases.load_torch, base)
    trials = partial(train_all, base=base.name, load=load, work=folder, progress=progress, plots=False)
    recipe = plan.recipe
    choice = placement.choose(item.job, item.plan, base, recipe, folder=folder, train_all=trials, progress=progress)
    placed = choice.chosen.placement
    chosen = options.placed(placed.target_modules, placed.r)
    planned = _with_options(item.plan, chosen)
    key = _key(planned, base, item.job.train, item.job.validation)
    job = replace(item.job, options=chosen, key=key)
    return replace(item, plan=planned, job=job, choices={**item.choices, "placement": choice.to_json()})


def _with_options(planned: AdapterPlan, options: MethodOptions) -> AdapterPlan:
    assert planned.trained is not None
    return with_options(planned, options, planned.trained.base)


def _with_draft(
    item: PreparedAdapter, base: Base, tokenizer: GgufTokenizer, target: str, progress: Progress
) -> PreparedAdapter:
    """The same with a draft table, if it is to have one and it makes decoding faster."""
    if not item.plan.has_draft:
        return item
    digest = digest_of_tokenizer(base.header)
    table, tokens_per_step = draft_of(item.job.train, item.job.validation, tokenizer, digest, target)
    progress.say(f"{item.plan.name}: drafts give {tokens_per_step:.1f} tokens per step on the validation rows")
    return replace(item, draft=table, choices={**item.choices, "draft_tokens_per_step": round(tokens_per_step, 2)})


def _key(planned: AdapterPlan, base: Base, train: Sequence[Example], validation: Sequence[Example]) -> str:
    method = planned.spec.method.model_dump(mode="json")
    start = planned.start
    state = [base.fingerprint, method, planned.training.model_dump(mode="json"), planned.on_grid]
    state += [len(train)] if start is None else [len(train), sha256_of(find_weights(start))]
    return key_of(state, ((row.tokens, row.learned, row.weight) for row in (*train, *validation)))


def _file_to_map(base: Base, spec: BundleSpec, folder: Path, progress: Progress) -> Path | None:
    """The file to map the base's weights from, because memory is short; None if it is not."""
    weights_mb, free_mb = BaseShape.of_header(base.header).weights_mb, machine.free_mb()
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
