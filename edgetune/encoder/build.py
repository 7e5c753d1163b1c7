"""Recipe of `task: text-classification` in, bundle out: train each task, export all to one graph, compare, pack."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from edgetune_export.adapters.shapes import LowRank
from edgetune_export.backends.onnx.encoder import EncoderSource, write_encoder, write_task
from edgetune_export.pack import pack
from edgetune_runtime.bundle import CLASSIFICATION, AdapterEntry, BaseEntry, Manifest, sha256_of
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer
from edgetune_runtime.errors import UsageError

from edgetune import methods
from edgetune.bases import check_context
from edgetune.data import TooLong
from edgetune.digests import key_of
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.result import BuildResult
from edgetune.tasks import Task, read_task
from edgetune.training.job import TrainingJob, TrainResult
from edgetune.training.jobs import train_all
from edgetune.training.loop import processes

from . import base as bases
from .base import TOKENIZER, EncoderBase
from .objective import Classify, Labelled, load_head, tokenize_labelled
from .verify import Agreement, TrainedTask, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENGINE = "onnx"
ADAPTER_FILE = "adapter.onnx_adapter"
# Held-out rows that each task is compared on.
PARITY_ROWS = 64


@dataclass(frozen=True)
class _Work:
    """A task, its training, and the rows that were left out."""

    task: Task
    job: TrainingJob[Labelled]
    too_long: TooLong


@dataclass(frozen=True)
class _Exported:
    """What was staged: the graph, each task's file, and how far they are from what was trained."""

    graph: Path
    files: Mapping[str, Path]
    folded: Mapping[str, LowRank]
    agreement: Mapping[str, Agreement]
    base_parity: Mapping[str, float]
    parameters: int


def build_encoder(recipe: Recipe, out: Path, *, progress: Progress) -> BuildResult | None:
    """As `pipeline.build`, for an encoder; `out` has been checked."""
    work = out.with_name(f"{out.name}.work")
    tasks = [read_task(name, recipe) for name in recipe.adapters]
    _check_labels(tasks)
    base = bases.resolve(recipe)
    check_context(recipe, base.context_length)
    recipe = recipe.model_copy(update={"context_length": min(recipe.context_length, base.context_length)})
    todo = _plan(tasks, base, recipe.context_length, progress)
    load = partial(bases.load_torch, base)
    results = train_all([item.job for item in todo], base.name, load, work / "train", progress)
    if not processes().is_main_process:
        return None
    stage = work / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    exported = _export(recipe, base, [_trained(item, work / "train") for item in todo], stage, progress)
    entries = {item.task.name: _entry(item, base, exported, results[item.task.name], stage) for item in todo}
    pack(stage, out, _manifest(recipe, base, entries, exported, stage))
    shutil.rmtree(stage, ignore_errors=True)
    sizes = {name: (out / entry.files[ENGINE]).stat().st_size for name, entry in entries.items()}
    return BuildResult(out, {item.task.name: _figures(item, entries, sizes, work) for item in todo})


def _check_labels(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if len(task.labels) < 2:
            found = ", ".join(map(repr, task.labels)) or "none"
            message = f"adapter {task.name!r} needs rows of at least 2 labels to tell apart, there is: {found}"
            raise UsageError(message, "give rows of text and label")


def _plan(tasks: Sequence[Task], base: EncoderBase, context_length: int, progress: Progress) -> list[_Work]:
    """What there is to train, in tokens; rows that are too long are told."""
    tokenizer = EncoderTokenizer(base.folder / TOKENIZER)
    todo = []
    for task in tasks:
        train, long_train = tokenize_labelled(task.train, tokenizer, task.labels, context_length)
        validation, long_validation = tokenize_labelled(task.validation, tokenizer, task.labels, context_length)
        where = (*long_train.examples, *long_validation.examples)[:3]
        too_long = TooLong(long_train.count + long_validation.count, where)
        if too_long.count:
            progress.say(f"{task.name}: {too_long.count} rows are longer than {context_length} tokens: {where[0]} …")
        method = task.spec.method
        job = TrainingJob(
            task.name,
            methods.load(method.name),
            method.options,
            task.training,
            train,
            validation,
            _key(task, base, [*train, *validation]),
            Classify(base.hidden_size, len(task.labels)),
        )
        todo.append(_Work(task, job, too_long))
    return todo


def _key(task: Task, base: EncoderBase, rows: Sequence[Labelled]) -> str:
    options = task.spec.method.model_dump(mode="json")
    state = [CLASSIFICATION, base.fingerprint, options, task.training.model_dump(mode="json"), list(task.labels)]
    return key_of(state, ((row.tokens, row.label) for row in rows))


def _trained(item: _Work, work: Path) -> TrainedTask:
    probes = [row.tokens for row in item.job.validation[:PARITY_ROWS]]
    spec = item.task.spec
    return TrainedTask(
        item.task.name,
        work / item.task.name / "adapter",
        spec.method.name,
        spec.method.options,
        probes,
        spec.scale,
        spec.dtype_in(ENGINE),
    )


def _export(
    recipe: Recipe, base: EncoderBase, tasks: Sequence[TrainedTask], stage: Path, progress: Progress
) -> _Exported:
    """Stage the graph and the tasks' files and compare them with what was trained."""
    progress.say("writing onnx")
    int8 = recipe.onnx.weights != "fp32"
    model = bases.load_torch(base, torch.float32).eval()
    folded = {task.name: _folded(task, model) for task in tasks}
    way = stage / "way"
    source = EncoderSource(model, base.folder / TOKENIZER, base.fingerprint, base.context_length, way)
    modules = {module for adapter in folded.values() for module in adapter.modules}
    graph = write_encoder(source, stage / "base" / ENGINE, modules, int8=int8)
    files = {}
    for task in tasks:
        head = load_head(task.folder)
        weights = head.weight.detach().numpy(), head.bias.detach().numpy()
        files[task.name] = stage / "adapters" / task.name / ADAPTER_FILE
        write_task(
            folded[task.name],
            weights,
            graph,
            files[task.name],
            dtype=task.dtype,
            base_fingerprint=base.fingerprint,
        )
    progress.say("checking that the bundle says what was trained")
    agreement, base_parity = verify(model, tasks, graph, files, int8=int8, progress=progress)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _Exported(graph, files, folded, agreement, base_parity, parameters)


def _folded(task: TrainedTask, base: PreTrainedModel) -> LowRank:
    folded = methods.load(task.method).fold(task.checkpoint(base), LowRank.shape)
    assert isinstance(folded, LowRank)
    return folded


def _entry(item: _Work, base: EncoderBase, exported: _Exported, result: TrainResult, stage: Path) -> AdapterEntry:
    name, spec = item.task.name, item.task.spec
    return AdapterEntry(
        name=name,
        method=spec.method.name,
        shapes={ENGINE: "low_rank"},
        files={ENGINE: exported.files[name].relative_to(stage).as_posix()},
        base_fingerprint=base.fingerprint,
        ranks={module: delta.rank for module, delta in exported.folded[name].modules.items()},
        scale=spec.scale,
        metric=item.task.metric,
        labels=item.task.labels,
        parity={ENGINE: asdict(exported.agreement[name])},
        training=result.figures(),
    )


def _manifest(
    recipe: Recipe, base: EncoderBase, entries: Mapping[str, AdapterEntry], exported: _Exported, stage: Path
) -> Manifest:
    entry = BaseEntry(
        name=Path(base.name).name,
        fingerprint=base.fingerprint,
        architecture=base.architecture,
        quantization="f32" if recipe.onnx.weights == "fp32" else "int8",
        parameters=exported.parameters,
        context_length=base.context_length,
        layers=base.layers,
        kv_bytes_per_token=0,
        tokenizer_sha256=sha256_of(base.folder / TOKENIZER),
        chat_template_sha256="",
        files={ENGINE: exported.graph.relative_to(stage).as_posix()},
        parity={ENGINE: exported.base_parity},
    )
    names = ("edgetune", "edgetune-runtime", "onnxruntime", "torch", "transformers", "peft")
    return Manifest(
        name=recipe.name,
        base=entry,
        adapters=entries,
        files={},
        context_length=recipe.context_length,
        threads=recipe.threads,
        recipe=recipe.resolved(),
        versions={name: importlib.metadata.version(name) for name in names},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=CLASSIFICATION,
    )


def _figures(item: _Work, entries: Mapping[str, AdapterEntry], sizes: Mapping[str, int], work: Path) -> dict[str, Any]:
    name = item.task.name
    entry = entries[name]
    return {
        **entry.training,
        "parity": entry.parity[ENGINE],
        "parity_by_target": entry.parity,
        "bytes": sizes[name],
        "rows_too_long": item.too_long.count,
        "plot": str(work / "train" / name / "training.png"),
    }
