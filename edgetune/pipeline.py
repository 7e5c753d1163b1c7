"""Recipe in, bundle out: the whole flow of `edgetune build`; adapters trained elsewhere in, bundle out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_export import architectures, backends
from edgetune_export.backends.base import Weights
from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import CLASSIFICATION
from edgetune_runtime.engines.gguf.engine import GgufTokenizer
from edgetune_runtime.text.chat import messages_for, render

from edgetune.digests import key_of
from edgetune.objectives.example import Example

from . import bases, methods, plan
from . import needs as build_needs
from .bases import Base, base_context_length, check_context
from .data import TaskRow, TooLong
from .domain import continued as domain
from .domain.texts import Texts, read_texts
from .methods.lora import LoraOptions
from .placement import choose as placement
from .progress import Progress
from .recipe.model import Recipe
from .result import BuildResult
from .shipping.ship import BundleSpec, ShippedAdapter, ship
from .shipping.verify import TrainedAdapter
from .targets import check_shapes
from .tasks import Task, read_task
from .training.job import TrainingJob, TrainResult
from .training.jobs import train_all
from .training.loop import processes
from .training.precision import check_precision

if TYPE_CHECKING:
    import torch
    from edgetune_runtime.formats.gguf_file import GgufHeader
    from transformers import PreTrainedModel

# Held-out rows that each adapter is compared on.
PARITY_ROWS = 12
# Rows whose texts tokenizers are compared on.
TEXT_ROWS = 100
# Training rows of each task that weights are rounded to, where the method takes such.
CALIBRATION_ROWS = 16
# What adapters trained elsewhere are compared on, as there are no rows of their tasks.
PROBES = (
    "Turn off the lamp in the hall, please.",
    "What is the weather like in Lisbon tomorrow morning?",
    'Sort this message: "I have been waiting for my parcel since last week."',
    "Write one sentence about the sea, and one about a train that is late.",
)


@dataclass(frozen=True)
class _Work:
    """A task, its training, the rows that were left out, and how its modules were chosen if the recipe does not say."""

    task: Task
    job: TrainingJob[Example]
    too_long: TooLong
    placement: placement.PlacementChoice | None = None

    def figures(self, result: TrainResult) -> dict[str, Any]:
        """What the training gave, and what the choice of its modules was made by, as JSON values."""
        chosen = {} if self.placement is None else {"placement": self.placement.to_json()}
        return {**result.figures(), **chosen}


def build(recipe: Recipe, out: Path, *, progress: Progress, converter: Path | None = None) -> BuildResult | None:
    """Train what is not trained yet, export, check parity and pack `out`; what is on the way lies in `<out>.work`.

    A build that was stopped goes on where it was. Of several processes under a launcher, all train and the first one
    does the rest; the others return None. Raises EdgetuneError; `out` is then as it was before.
    """
    state = processes()
    if not state.is_main_process:
        progress = Progress(quiet=True)
    check_destination(out)
    check_shapes(recipe)
    check_precision(recipe, lambda: state.device.type)
    if recipe.task == CLASSIFICATION:
        from .encoder.build import build_encoder  # noqa: PLC0415 - torch only when training

        return build_encoder(recipe, out, progress=progress)
    work = out.with_name(f"{out.name}.work")
    tasks = [read_task(name, recipe) for name in recipe.adapters]
    header = build_needs.header_of(recipe)
    _say_needs(recipe, tasks, header, out, progress)
    texts = read_texts(recipe)
    with state.main_process_first():
        base, recipe = base_of(recipe, work, progress, converter)
    if header is None:
        _say_needs(recipe, tasks, base.header, out, progress)
    if texts is not None:
        # What is wrong with the adapters' rows shows before the base is trained for hours.
        _plan(tasks, base, recipe.context_length, Progress(quiet=True))
        base = continue_base(recipe, texts, base, work, progress)
    todo = _plan(tasks, base, recipe.context_length, progress)
    load = partial(bases.load_torch, base)
    todo, recipe = _place(todo, base, recipe, work=work / "placement", load=load, progress=progress)
    results = train_all([item.job for item in todo], base.name, load, work / "train", progress)
    if not state.is_main_process:
        return None
    adapters = [_trained(item, results[item.job.name], work / "train") for item in todo]
    shipped = ship(base, adapters, work / "stage", out, wanted=_wanted(recipe, todo), progress=progress)
    figures = {
        item.job.name: {
            **item.figures(results[item.job.name]),
            **_figures(shipped[item.job.name]),
            "rows_too_long": item.too_long.count,
            "plot": str(work / "train" / item.job.name / "training.png"),
        }
        for item in todo
    }
    plot = {"plot": str(work / domain.NAME / "training.png")} if base.domain else {}
    trained = {adapter.name: adapter for adapter in adapters}
    return BuildResult(out, figures, {**base.domain, **plot}, base, trained)


def export_trained(
    base: str,
    folders: Mapping[str, Path],
    out: Path,
    *,
    quantize: str | None = None,
    systems: Mapping[str, str] | None = None,
    merged: bool = False,
    targets: tuple[str, ...] = (backends.DEFAULT,),
    progress: Progress,
    converter: Path | None = None,
) -> BuildResult:
    """Bundle PEFT folders trained elsewhere with their base; parity is checked on a few built-in prompts."""
    check_destination(out)
    started = time.monotonic()
    defaults = Recipe.model_fields
    work = out.with_name(f"{out.name}.work")
    found = bases.resolve(
        base,
        folder=Path(),
        quantize=quantize,
        work=work / "base",
        progress=progress,
        converter=converter,
    )
    architectures.of(found.header).check_formats(targets)
    prompts = systems or {}
    adapters = [_elsewhere(name, folder, prompts.get(name), found, merged=merged) for name, folder in folders.items()]
    context_length = min(defaults["context_length"].default, base_context_length(found.header))
    wanted = BundleSpec(out.name, context_length, targets=targets)
    shipped = ship(found, adapters, work / "stage", out, wanted=wanted, progress=progress)
    seconds = round(time.monotonic() - started, 1)
    return BuildResult(out, {name: {**_figures(item), "seconds": seconds} for name, item in shipped.items()})


def _say_needs(recipe: Recipe, tasks: Sequence[Task], header: GgufHeader | None, out: Path, progress: Progress) -> None:
    """Tell what the build takes, as soon as it is known; refused here if this machine cannot give it."""
    needs = build_needs.told(recipe, tasks, header, out)
    if needs is None:
        return
    progress.say(f"needs {needs['summary']}")
    for warning in needs["warnings"]:
        progress.say(f"warning: {warning}")


def base_of(recipe: Recipe, work: Path, progress: Progress, converter: Path | None) -> tuple[Base, Recipe]:
    """The base, and the recipe with what its board picks filled in; refused here if the board cannot hold it."""

    def resolve(quantize: str | None) -> Base:
        return bases.resolve(
            recipe.base,
            folder=recipe.folder,
            quantize=quantize,
            work=work / "base",
            progress=progress,
            converter=converter,
        )

    base = resolve(recipe.quantize)
    architectures.of(base.header).check_formats(recipe.targets)
    most = base_context_length(base.header)
    check_context(recipe, most)
    picked: dict[str, Any] = {"context_length": recipe.context_length}
    choice = plan.choose_for(recipe, base.header, requantize=bases.requantizes(recipe))
    if choice is not None:
        progress.say(f"{recipe.device}: {choice.reason}")
        picked = {"threads": choice.threads, "context_length": choice.context_length}
        if choice.quantize not in {None, recipe.quantize or bases.DEFAULT_QUANTIZATION}:
            picked["quantize"] = choice.quantize
            base = resolve(choice.quantize)
    # A default gives way to a base that was trained for less.
    picked["context_length"] = min(picked["context_length"], most)
    return base, recipe.model_copy(update=picked)


def continue_base(recipe: Recipe, texts: Texts, base: Base, work: Path, progress: Progress) -> Base:
    """The base continued on the texts of the recipe's domain; see `domain.continued`."""
    load = partial(bases.load_torch, base)
    trainer = partial(train_all, base=base.name, load=load, work=work, progress=progress)
    return domain.continued(recipe, texts, base, work, train_all=trainer, progress=progress)


def jobs_of(tasks: Sequence[Task], base: Base, context_length: int, progress: Progress) -> list[TrainingJob[Example]]:
    """The trainings of the tasks, in tokens of the base; rows that are too long are told."""
    return [item.job for item in _plan(tasks, base, context_length, progress)]


def _plan(tasks: Sequence[Task], base: Base, context_length: int, progress: Progress) -> list[_Work]:
    """What there is to train, in tokens; rows that are too long are told."""
    todo = []
    with closing(GgufTokenizer(base.path)) as tokenizer:
        for task in tasks:
            kind = methods.load(task.spec.method.name)
            room = context_length - kind.prefix_tokens(task.spec.method.options)
            training, validation, too_long = task.tokenize(tokenizer, room)
            if too_long.count:
                where = ", ".join(too_long.examples)
                progress.say(f"{task.name}: {too_long.count} rows are longer than {room} tokens: {where} …")
            rows = (*training, *validation)
            options = kind.prepared(task.spec.method.options, tokenizer, rows)
            method = task.spec.method.model_copy(update={"options": options})
            task = replace(task, spec=task.spec.model_copy(update={"method": method}))  # noqa: PLW2901 - now complete
            key = _key(task, base, rows)
            objective = kind.objective(options)
            job = TrainingJob(task.name, kind, options, task.training, training, validation, key, objective)
            todo.append(_Work(task, job, too_long))
    return todo


def _place(
    todo: Sequence[_Work],
    base: Base,
    recipe: Recipe,
    *,
    work: Path,
    load: Callable[[torch.dtype], PreTrainedModel],
    progress: Progress,
) -> tuple[list[_Work], Recipe]:
    """The same with modules and rank in place of `target_modules: auto`, in the recipe too."""
    trials = partial(train_all, base=base.name, load=load, work=work, progress=progress, plots=False)
    placed = []
    for item in todo:
        options, spec = item.job.options, item.task.spec
        if not isinstance(options, LoraOptions) or not options.is_auto:
            placed.append(item)
            continue
        choice = placement.choose(item.job, spec, base, recipe, folder=work, train_all=trials, progress=progress)
        chosen = options.placed(choice.chosen.placement.modules, choice.chosen.placement.rank)
        method = spec.method.model_copy(update={"options": chosen})
        task = replace(item.task, spec=spec.model_copy(update={"method": method}))
        key = _key(task, base, (*item.job.train, *item.job.validation))
        placed.append(replace(item, task=task, job=replace(item.job, options=chosen, key=key), placement=choice))
    adapters = {item.task.name: item.task.spec for item in placed}
    return placed, recipe.model_copy(update={"adapters": adapters})


def _key(task: Task, base: Base, examples: Sequence[Example]) -> str:
    options = task.spec.method.model_dump(mode="json")
    state = [base.fingerprint, options, task.training.model_dump(mode="json")]
    return key_of(state, ((example.tokens, example.learned) for example in examples))


def _wanted(recipe: Recipe, todo: Sequence[_Work]) -> BundleSpec:
    """What the recipe says of the bundle; the first training rows of each task calibrate what needs it."""
    onnx = recipe.onnx
    rows = [example.tokens for item in todo for example in item.job.train[:CALIBRATION_ROWS]]
    weights = Weights(onnx.weights, onnx.method, tuple(map(tuple, rows)) if onnx.method == "gptq" else ())
    return BundleSpec(
        recipe.name,
        recipe.context_length,
        recipe.threads,
        recipe.targets,
        weights,
        quantize_merged=recipe.quantize_merged,
        ships_states=recipe.states == "ship",
        recipe=recipe.resolved(),
    )


def _trained(item: _Work, result: TrainResult, work: Path) -> TrainedAdapter:
    spec = item.task.spec
    probes = item.job.validation[:PARITY_ROWS]
    return TrainedAdapter(
        name=item.job.name,
        folder=work / item.job.name / "adapter",
        method=spec.method.name,
        options=spec.method.options,
        probes=[example.tokens for example in probes],
        prompt_lengths=[example.prompt_length for example in probes],
        scale=spec.scale,
        system=spec.system,
        metric=item.task.metric,
        labels=item.task.labels,
        merged=spec.merged,
        dtypes={target: spec.dtype_in(target) for target in backends.names()},
        training=item.figures(result),
        texts=[text for row in item.task.validation[:TEXT_ROWS] for text in _texts(row)],
    )


def _texts(row: TaskRow) -> list[str]:
    parts = [row.text, row.completion, *(message["content"] for message in row.messages or ())]
    return [part for part in parts if part]


def _elsewhere(name: str, folder: Path, system: str | None, base: Base, *, merged: bool) -> TrainedAdapter:
    with closing(GgufTokenizer(base.path)) as tokenizer:
        rows = []
        for probe in PROBES:
            messages = messages_for(probe, system)
            ends = {"bos": tokenizer.bos, "eos": tokenizer.eos}
            text = render(tokenizer.chat_template, messages, add_generation_prompt=True, **ends)
            rows.append(tokenizer.tokenize(text))
    lengths = [len(row) for row in rows]
    method = methods.of_folder(folder)
    return TrainedAdapter(name, folder, method.name, method.options(), rows, lengths, system=system, merged=merged)


def _figures(shipped: ShippedAdapter) -> dict[str, Any]:
    parity = {target: asdict(found) for target, found in shipped.parity.items()}
    return {"parity": next(iter(parity.values())), "parity_by_target": parity, "bytes": shipped.bytes}
