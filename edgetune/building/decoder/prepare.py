"""Prepares a build with a decoder: converts and quantizes the base, continues its pretraining, chooses modules."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgetune_export.adapters.fold import find_weights
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.gguf.engine import GgufTokenizer
from edgetune_runtime.engines.gguf.llama import check_loads
from edgetune_runtime.formats.gguf_file import digest_of_tokenizer
from edgetune_runtime.wording import first_of

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.building.domain import continued as domain
from edgetune.building.outputs.drafts import draft_of
from edgetune.building.outputs.resolve import write_inferred
from edgetune.building.placement import choose as placement
from edgetune.common.digests import key_of
from edgetune.common.progress import Progress
from edgetune.methods import MethodOptions
from edgetune.methods.lora import LoraOptions
from edgetune.objectives.example import Example
from edgetune.planning.adapters import with_options
from edgetune.planning.on_device import check_fit
from edgetune.planning.records import AdapterPlan, BuildPlan, PlannedBuild
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import Prepared, PreparedAdapter
from edgetune.tasks.task import Task, Texts
from edgetune.training.hardware import processes
from edgetune.training.job import TrainingJob
from edgetune.training.jobs import train_all

from .importance import requested_importance


def base_to_train(planned: PlannedBuild, work: Path, progress: Progress, converter: Path | None) -> Base:
    """The base of the adapters, after continued pretraining if there is any; intermediate files are in `work`.

    Errors show as early as possible: if the board cannot run the bundle, or rows cannot be learned.
    """
    plan = planned.plan
    with processes().main_process_first():
        base = make_base(plan, work, progress, converter)
    if planned.texts is None:
        return base
    # Report errors in the adapters' rows before hours of training.
    training_jobs(plan, planned.tasks, base, Progress(quiet=True))
    return _continued(plan.recipe, planned.texts, base, work, progress)


def prepare(planned: PlannedBuild, base: Base, work: Path, progress: Progress) -> Prepared[Base]:
    """Everything else before the training of the adapters; intermediate files are in `work`."""
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


def make_base(plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> Base:
    """The base that the plan found, converted and quantized.

    VerificationError if llama.cpp cannot load it, IncompatibleError if it is too large for the board.
    """
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


def training_jobs(plan: BuildPlan, tasks: Sequence[Task], base: Base, progress: Progress) -> list[PreparedAdapter]:
    """A training job per task, tokenized for the base; reports rows that are too long."""
    with closing(GgufTokenizer(base.path)) as tokenizer:
        return [_job(plan, task, base, tokenizer, progress) for task in tasks]


def _job(plan: BuildPlan, task: Task, base: Base, tokenizer: GgufTokenizer, progress: Progress) -> PreparedAdapter:
    planned = plan.adapters[task.name]
    method = methods.load(planned.method)
    capacity = plan.recipe.context_length - method.prefix_tokens(planned.options)
    train, validation, too_long = task.tokenize(tokenizer, capacity)
    if too_long:
        progress.say(f"{task.name}: {len(too_long)} rows are longer than {capacity} tokens: {first_of(too_long)}")
    rows = (*train, *validation)
    planned = _with_options(planned, method.prepared(planned.options, tokenizer, rows), plan)
    job = TrainingJob(
        task.name,
        method,
        planned.options,
        planned.training,
        train,
        validation,
        _key(planned, base, rows),
        method.objective(planned.options),
        base.path if planned.on_grid else None,
        _start_of(planned),
    )
    return PreparedAdapter(planned, task, job, too_long)


def _continued(recipe: Recipe, texts: Texts, base: Base, work: Path, progress: Progress) -> Base:
    """The base after continued pretraining on the recipe's domain; see `domain.continued`."""
    load = partial(bases.load_torch, base)
    trainer = partial(train_all, base=base.name, load=load, work=work, progress=progress)
    return domain.continued(recipe, texts, base, work, train_all=trainer, progress=progress)


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
    planned = _with_options(item.plan, chosen, plan)
    key = _key(planned, base, (*item.job.train, *item.job.validation))
    job = replace(item.job, options=chosen, key=key)
    return replace(item, plan=planned, job=job, choices={**item.choices, "placement": choice.to_json()})


def _with_options(planned: AdapterPlan, options: MethodOptions, plan: BuildPlan) -> AdapterPlan:
    assert planned.trained is not None
    return with_options(planned, options, planned.trained.base, plan.recipe.format_options)


def _with_draft(
    item: PreparedAdapter, base: Base, tokenizer: GgufTokenizer, target: str, progress: Progress
) -> PreparedAdapter:
    """The same with a draft table, if the recipe asks for one and it makes decoding faster."""
    if not item.plan.spec.draft:
        return item
    digest = digest_of_tokenizer(base.header)
    table, tokens_per_step = draft_of(item.job.train, item.job.validation, tokenizer, digest, target)
    progress.say(f"{item.plan.name}: drafts give {tokens_per_step:.1f} tokens per step on the validation rows")
    return replace(item, draft=table, choices={**item.choices, "draft_tokens_per_step": round(tokens_per_step, 2)})


def _start_of(planned: AdapterPlan) -> Path | None:
    return None if planned.spec.start_from is None else Path(planned.spec.start_from)


def _key(planned: AdapterPlan, base: Base, examples: Sequence[Example]) -> str:
    method = {"name": planned.method, **planned.options.model_dump(mode="json")}
    start = _start_of(planned)
    state = [base.fingerprint, method, planned.training.model_dump(mode="json"), planned.on_grid]
    state += [] if start is None else [sha256_of(find_weights(start))]
    return key_of(state, ((example.tokens, example.learned, example.weight) for example in examples))
