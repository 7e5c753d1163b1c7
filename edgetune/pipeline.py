"""Builds a bundle from a recipe (`edgetune build`), or from adapters trained elsewhere (`edgetune export`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_export import architectures, backends
from edgetune_export.backends.base import OnnxOptions
from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.engines.gguf.engine import GgufTokenizer
from edgetune_runtime.text.chat import messages_for
from edgetune_runtime.tools.prompts import prompt_tokens

from . import bases, builders, methods
from .bases import Base, trained_context_length
from .builders import Builder
from .data import TaskRow
from .prepared import Prepared
from .progress import Progress
from .recipe.model import Recipe
from .result import Build
from .shipping.exported import BundleSpec, TrainedAdapter
from .shipping.ship import ShippedAdapter, ship
from .tasks import read_task
from .training.hardware import processes
from .training.jobs import train_all
from .training.precision import check_precision
from .work_folder import clear, locked, work_folder

# Training rows per task for calibration, if the ONNX rounding method uses calibration.
CALIBRATION_ROWS = 16
# Prompts for the parity check of adapters trained elsewhere, which come without rows.
PROBES = (
    "Turn off the lamp in the hall, please.",
    "What is the weather like in Lisbon tomorrow morning?",
    'Sort this message: "I have been waiting for my parcel since last week."',
    "Write one sentence about the sea, and one about a train that is late.",
)


def build(
    recipe: Recipe, out: Path, *, progress: Progress, converter: Path | None = None, resume: bool = True
) -> Build:
    """Train the adapters, export, check parity and pack `out`; intermediate files are in `<out>.work`.

    A stopped build resumes, unless `resume` is False. With several processes under a launcher, all train and the first
    one does the rest. Raises EdgetuneError, also if another build uses `<out>.work`; `out` is then unchanged.
    """
    state = processes()
    if not state.is_main_process:
        progress = Progress(quiet=True)
    check_destination(out)
    builder = builders.load(recipe.task)
    builder.check_methods(recipe)
    check_precision(recipe, lambda: state.device.type)
    tasks = [read_task(name, recipe) for name in recipe.adapters]
    work = work_folder(out)
    with locked(work) if state.is_main_process else nullcontext():
        with state.main_process_first():
            if state.is_main_process and not resume:
                clear(work)
        prepared = builder.prepare(recipe, tasks, out, progress, converter)
        return _built(prepared, builder, out, progress)


def _built(prepared: Prepared[Any], builder: Builder[Any], out: Path, progress: Progress) -> Build:
    base, work = prepared.base, work_folder(out)
    load = partial(builder.load_torch, base)
    results = train_all([item.job for item in prepared.trainings], base.name, load, work / "train", progress)
    if not processes().is_main_process:
        return Build(out)
    adapters = {
        item.job.name: builder.trained(item, results[item.job.name], work / "train") for item in prepared.trainings
    }
    wanted = _wanted(prepared, builder)
    shipped = ship(builder, base, list(adapters.values()), work / "stage", out, wanted=wanted, progress=progress)
    figures = {
        item.job.name: {
            **item.figures(results[item.job.name]),
            **_figures(shipped[item.job.name]),
            "rows_too_long": item.too_long.count,
            "plot": str(work / "train" / item.job.name / "training.png"),
        }
        for item in prepared.trainings
    }
    losses = {name: result.history for name, result in results.items()}
    prompts = {item.task.name: item.task.sample_prompt for item in prepared.trainings}
    return Build(out, figures, losses, prepared.domain, base, adapters, prompts)


def export_trained(
    base: str,
    folders: Mapping[str, Path],
    out: Path,
    *,
    quantization: str | None = None,
    systems: Mapping[str, str] | None = None,
    merged: bool = False,
    targets: tuple[str, ...] = (backends.DEFAULT,),
    progress: Progress,
    converter: Path | None = None,
) -> Build:
    """Bundle PEFT folders trained elsewhere with their base; parity is checked on built-in prompts."""
    check_destination(out)
    started = time.monotonic()
    defaults = Recipe.model_fields
    work = work_folder(out)
    with locked(work):
        found = bases.resolve(
            base,
            folder=Path(),
            quantization=quantization,
            work=work / "base",
            progress=progress,
            converter=converter,
        )
        architectures.of(found.header).check_formats(targets)
        prompts = systems or {}
        adapters = [_elsewhere(name, path, prompts.get(name), found, merged=merged) for name, path in folders.items()]
        context_length = min(defaults["context_length"].default, trained_context_length(found.header))
        wanted = BundleSpec(out.name, context_length, targets=targets)
        builder = builders.load(GENERATION)
        shipped = ship(builder, found, adapters, work / "stage", out, wanted=wanted, progress=progress)
    figures = {name: _figures(item) for name, item in shipped.items()}
    return Build(out, figures, seconds=round(time.monotonic() - started, 1))


def _wanted(prepared: Prepared[Any], builder: Builder[Any]) -> BundleSpec:
    """The settings of the bundle; the first training rows of each task are for calibration."""
    recipe = prepared.recipe
    rows = [row.tokens for item in prepared.trainings for row in item.job.train[:CALIBRATION_ROWS]]
    calibration = tuple(map(tuple, rows)) if recipe.onnx.method == "gptq" else ()
    return BundleSpec(
        recipe.name,
        recipe.context_length,
        recipe.threads,
        recipe.targets,
        OnnxOptions(recipe.onnx.weights, recipe.onnx.method, calibration),
        merged_quantization=recipe.merged_quantization,
        ships_states=recipe.states == "ship" and builder.keeps_states,
        warms=recipe.states == "start" and builder.keeps_states,
        recipe=recipe.resolved(),
    )


def _elsewhere(name: str, folder: Path, system: str | None, base: Base, *, merged: bool) -> TrainedAdapter:
    with closing(GgufTokenizer(base.path)) as tokenizer:
        rows = []
        for probe in PROBES:
            rows.append(prompt_tokens(tokenizer, messages_for(probe, system)))
    lengths = [len(row) for row in rows]
    method = methods.of_folder(folder)
    asked = [TaskRow("built-in", messages=tuple(messages_for(probe, None))) for probe in PROBES]
    return TrainedAdapter(
        name,
        folder,
        method.name,
        method.options(),
        rows,
        lengths,
        system=system,
        merged=merged,
        golden_rows=asked,
    )


def _figures(shipped: ShippedAdapter) -> dict[str, Any]:
    parity = shipped.entry.parity
    return {"parity": next(iter(parity.values())), "parity_by_target": parity, "bytes": shipped.bytes}
