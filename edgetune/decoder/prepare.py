"""Prepares a build with a decoder: converts and quantizes the base, continues its pretraining, chooses modules."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.gguf.engine import GgufTokenizer
from edgetune_runtime.formats.gguf_file import GgufHeader, digest_of_tokenizer

from edgetune import bases, methods, plan
from edgetune import needs as build_needs
from edgetune.bases import Base, check_context, trained_context_length
from edgetune.digests import key_of
from edgetune.domain import continued as domain
from edgetune.domain.texts import Texts, read_texts
from edgetune.methods.lora import LoraOptions
from edgetune.objectives.example import Example
from edgetune.outputs.drafts import draft_of
from edgetune.outputs.resolve import output_of_task
from edgetune.placement import choose as placement
from edgetune.prepared import PlannedTraining, Prepared
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.tasks import Task
from edgetune.training.hardware import processes
from edgetune.training.job import TrainingJob
from edgetune.training.jobs import train_all


def prepare(
    recipe: Recipe, tasks: Sequence[Task], out: Path, progress: Progress, converter: Path | None
) -> Prepared[Base]:
    """Everything before the training of the adapters; intermediate files are in `<out>.work`.

    Errors show as early as possible: if this machine cannot build `out`, or the board cannot run it.
    """
    work = out.with_name(f"{out.name}.work")
    header = build_needs.header_of(recipe)
    _say_needs(recipe, tasks, header, out, progress)
    texts = read_texts(recipe)
    with processes().main_process_first():
        base, recipe = resolve(recipe, work, progress, converter)
    if header is None:
        _say_needs(recipe, tasks, base.header, out, progress)
    outputs = [output_of_task(task, work / "output", progress) for task in tasks]
    if texts is not None:
        # Report errors in the adapters' rows before hours of training.
        plan_trainings(tasks, base, recipe.context_length, Progress(quiet=True))
        base = _continued(recipe, texts, base, work, progress)
    with closing(GgufTokenizer(base.path)) as tokenizer:
        trainings = _planned(tasks, base, tokenizer, recipe.context_length, progress)
        trainings = _with_drafts(trainings, base, tokenizer, recipe, progress)
    placed = [
        replace(_placed(item, base, recipe, work, progress), output=output)
        for item, output in zip(trainings, outputs, strict=True)
    ]
    adapters = {item.task.name: item.task.spec for item in placed}
    plot = {"plot": str(work / domain.NAME / "training.png")} if base.domain else {}
    return Prepared(base, recipe.model_copy(update={"adapters": adapters}), placed, {**base.domain, **plot})


def resolve(recipe: Recipe, work: Path, progress: Progress, converter: Path | None) -> tuple[Base, Recipe]:
    """The base, and the recipe with the choices for its board; IncompatibleError if the board is too small.

    The board chooses from the header, before any conversion, so a folder is converted and quantized once.
    """
    header = bases.header_of(recipe)
    trained = trained_context_length(header)
    check_context(recipe, trained)
    picked: dict[str, Any] = {"context_length": recipe.context_length}
    choice = plan.choose_for(recipe, header)
    if choice is not None:
        progress.say(f"{recipe.device}: {choice.reason}")
        picked = {"threads": choice.threads, "context_length": choice.context_length}
        picked["quantization"] = choice.quantization
    # The default may be more than the base supports.
    picked["context_length"] = min(picked["context_length"], trained)
    recipe = recipe.model_copy(update=picked)
    base = bases.resolve(
        recipe.base,
        folder=recipe.folder,
        quantization=recipe.quantization,
        work=work / "base",
        progress=progress,
        converter=converter,
    )
    # The choice used a predicted header if the base is a folder.
    plan.check_fit(recipe, base.header)
    return base, recipe


def plan_trainings(tasks: Sequence[Task], base: Base, context_length: int, progress: Progress) -> list[PlannedTraining]:
    """A training job per task, tokenized for the base; reports rows that are too long."""
    with closing(GgufTokenizer(base.path)) as tokenizer:
        return _planned(tasks, base, tokenizer, context_length, progress)


def _planned(
    tasks: Sequence[Task], base: Base, tokenizer: GgufTokenizer, context_length: int, progress: Progress
) -> list[PlannedTraining]:
    todo = []
    for task in tasks:
        kind = methods.load(task.spec.method.name)
        capacity = context_length - kind.prefix_tokens(task.spec.method.options)
        training, validation, too_long = task.tokenize(tokenizer, capacity)
        if too_long.count:
            where = ", ".join(too_long.examples)
            progress.say(f"{task.name}: {too_long.count} rows are longer than {capacity} tokens: {where} …")
        rows = (*training, *validation)
        options = kind.prepared(task.spec.method.options, tokenizer, rows)
        method = task.spec.method.model_copy(update={"options": options})
        task = replace(task, spec=task.spec.model_copy(update={"method": method}))  # noqa: PLW2901 - now complete
        key = _key(task, base, rows)
        objective = kind.objective(options)
        job = TrainingJob(task.name, kind, options, task.training, training, validation, key, objective)
        todo.append(PlannedTraining(task, job, too_long))
    return todo


def _say_needs(recipe: Recipe, tasks: Sequence[Task], header: GgufHeader | None, out: Path, progress: Progress) -> None:
    """Report the memory and disk space that the build needs; raise an error if this machine has too little."""
    needs = build_needs.told(recipe, tasks, header, out)
    if needs is None:
        return
    progress.say(f"needs {needs['summary']}")
    for warning in needs["warnings"]:
        progress.say(f"warning: {warning}")


def _continued(recipe: Recipe, texts: Texts, base: Base, work: Path, progress: Progress) -> Base:
    """The base after continued pretraining on the recipe's domain; see `domain.continued`."""
    load = partial(bases.load_torch, base)
    trainer = partial(train_all, base=base.name, load=load, work=work, progress=progress)
    return domain.continued(recipe, texts, base, work, train_all=trainer, progress=progress)


def _placed(item: PlannedTraining, base: Base, recipe: Recipe, work: Path, progress: Progress) -> PlannedTraining:
    """The same with modules and rank chosen, if the recipe has `target_modules: auto`."""
    options, spec, folder = item.job.options, item.task.spec, work / "placement"
    if not isinstance(options, LoraOptions) or not options.is_auto:
        return item
    load = partial(bases.load_torch, base)
    trials = partial(train_all, base=base.name, load=load, work=folder, progress=progress, plots=False)
    choice = placement.choose(item.job, spec, base, recipe, folder=folder, train_all=trials, progress=progress)
    chosen = options.placed(choice.chosen.placement.target_modules, choice.chosen.placement.r)
    method = spec.method.model_copy(update={"options": chosen})
    task = replace(item.task, spec=spec.model_copy(update={"method": method}))
    key = _key(task, base, (*item.job.train, *item.job.validation))
    job = replace(item.job, options=chosen, key=key)
    return replace(item, task=task, job=job, choices={**item.choices, "placement": choice.to_json()})


def _with_drafts(
    trainings: Sequence[PlannedTraining], base: Base, tokenizer: GgufTokenizer, recipe: Recipe, progress: Progress
) -> list[PlannedTraining]:
    """The same with draft tables where they make decoding faster."""
    found, digest = [], digest_of_tokenizer(base.header)
    for item in trainings:
        if item.task.spec.draft:
            rows = item.job.train, item.job.validation
            table, worth = draft_of(*rows, tokenizer, digest, recipe.targets[0])
            progress.say(f"{item.task.name}: drafts give {worth:.1f} tokens per step on the validation rows")
            item = replace(  # noqa: PLW2901 - now complete
                item, draft=table, choices={**item.choices, "draft_tokens_per_step": round(worth, 2)}
            )
        found.append(item)
    return found


def _key(task: Task, base: Base, examples: Sequence[Example]) -> str:
    options = task.spec.method.model_dump(mode="json")
    state = [base.fingerprint, options, task.training.model_dump(mode="json")]
    return key_of(state, ((example.tokens, example.learned) for example in examples))
