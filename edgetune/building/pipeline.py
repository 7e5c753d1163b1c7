"""Builds a bundle from a recipe (`edgetune build`), or from adapters trained elsewhere (`edgetune export`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_export import architectures, backends
from edgetune_export.adapters.fold import find_weights
from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import GENERATION, Manifest
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.chat import messages_for
from edgetune_runtime.tools.prompts import prompt_tokens

from edgetune import bases, methods
from edgetune.bases import Base, trained_context_length
from edgetune.common.progress import Progress
from edgetune.common.work_folder import clear, locked, named, work_folder
from edgetune.planning.adapters import plan_export
from edgetune.planning.records import AdapterPlan, BuildPlan, PlannedBuild
from edgetune.recipe.data import DataSpec
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec, MethodSpec
from edgetune.recipe.targets import shapes_in
from edgetune.shipping.existing import ExistingBundle
from edgetune.shipping.exported import BundleSpec, Prepared, TrainedAdapter
from edgetune.shipping.ship import ship
from edgetune.tasks.data import TaskRow
from edgetune.training.hardware import processes, use_device
from edgetune.training.jobs import train_all

from . import builders
from .builders import Builder
from .cross_fitting import fold_adapters, trainings
from .decoder.quantization import choose_quantization
from .into import check_slots, plan_into, router_change
from .on_cluster import train_on_cluster
from .plan import plan_build, with_download, with_quantization
from .result import Build
from .routing.train import train_router

# Training rows per task for calibration, if the ONNX rounding method uses calibration.
CALIBRATION_ROWS = 16
# The data of adapters trained elsewhere, which come without rows: prompts for the parity check.
BUILT_IN = "built-in"
PROBES = (
    "Turn off the lamp in the hall, please.",
    "What is the weather like in Lisbon tomorrow morning?",
    'Sort this message: "I have been waiting for my parcel since last week."',
    "Write one sentence about the sea, and one about a train that is late.",
)


def build(
    recipe: Recipe,
    out: Path,
    *,
    progress: Progress,
    converter: Path | None = None,
    resume: bool = True,
    into: bool = False,
    on_cluster: bool = False,
) -> Build:
    """Train the adapters, export, check parity and pack `out`; intermediate files are in `<out>.work`.

    A stopped build resumes, unless `resume` is False. With `into`, the adapters are added to the bundle `out`, with a
    router if the recipe has one; with `on_cluster`, they are trained on a Ray cluster. With several processes under a
    launcher, all train and the first one does the rest. Raises EdgetuneError, also if another build uses `<out>.work`;
    `out` is then unchanged.
    """
    out = named(out)
    use_device(recipe.training.device)
    state = processes()
    if not state.is_main_process:
        progress = Progress(quiet=True)
    existing = None
    if into:
        planned, existing = plan_into(recipe, out)
    else:
        check_destination(out)
        planned = plan_build(recipe, out)
        if planned.plan.source is not None:
            _check_keeps(planned.plan.source.path, out)
    if planned.plan.source is None:
        with state.main_process_first():
            planned = with_download(planned, out)
        if existing is not None:
            check_slots(planned.plan, existing)
    _say_plan(planned.plan, progress)
    if existing is not None and (change := router_change(recipe, existing)) is not None:
        progress.say(change)
    work = work_folder(out)
    with locked(work) if state.is_main_process else nullcontext():
        with state.main_process_first():
            if state.is_main_process and not resume:
                # Another build of the bundle may resume the trainings of its other adapters.
                for folder in [work] if existing is None else trainings(work / "train", recipe.adapters):
                    clear(folder)
            if planned.plan.base.candidates:
                quantization = choose_quantization(planned.plan, planned.tasks, work / "base", progress, converter)
                planned = with_quantization(planned, quantization, out)
        return _built(planned, out, progress, converter, existing, on_cluster=on_cluster)


def _built(
    planned: PlannedBuild,
    out: Path,
    progress: Progress,
    converter: Path | None,
    existing: ExistingBundle | None,
    *,
    on_cluster: bool,
) -> Build:
    builder, work = builders.load(planned.plan.recipe.task), work_folder(out)
    base = builder.base_to_train(planned, work, progress, converter)
    if existing is not None:
        existing.check_base(base.name, base.fingerprint)
    prepared = builder.prepare(planned, base, work, progress)
    items = {item.plan.name: item for item in prepared.adapters}
    with_folds = [*items.values(), *fold_adapters(builder, planned.plan, prepared, base)]
    if on_cluster:
        train_on_cluster(prepared, work, progress)
    load = partial(builder.load_torch, base)
    results = train_all([item.job for item in with_folds], base.name, load, work / "train", progress)
    if not processes().is_main_process:
        return Build(out)
    trained = {item.plan.name: item.trained(results[item.plan.name], work / "train") for item in with_folds}
    spec = replace(_spec_of(prepared, builder, progress), existing=existing)
    manifest = ship(builder, base, list(trained.values()), work / "stage", out, spec=spec, progress=progress)
    adapters = {name: trained[name] for name in items}
    figures = {
        name: {
            **item.figures(results[name]),
            **_figures(manifest, name),
            "rows_too_long": len(item.too_long),
            "plot": str(work / "train" / name / "training.png"),
        }
        for name, item in items.items()
    }
    losses = {name: results[name].history for name in items}
    # Calls of tools need more than a prompt.
    plain = [task for task in planned.tasks if not any(row.tools for row in task.validation)]
    prompts = {task.name: task.sample_prompt for task in plain}
    router = None if manifest.router is None else asdict(manifest.router)
    return Build(out, figures, losses, prepared.domain, base, adapters, prompts, router=router)


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
    out = named(out)
    check_destination(out)
    if Path(base).exists():
        _check_keeps(Path(base), out)
    started = time.monotonic()
    defaults = Recipe.model_fields
    prompts = systems or {}
    plans = [_plan_peft(name, folder, targets, prompts.get(name), merged=merged) for name, folder in folders.items()]
    work = work_folder(out)
    with locked(work):
        resolved = bases.resolve(
            base,
            folder=Path(),
            quantization=quantization,
            work=work / "base",
            progress=progress,
            converter=converter,
        )
        architectures.of(resolved.header).check_header(resolved.header, targets)
        adapters = [_from_peft_folder(plan, folders[plan.name], resolved) for plan in plans]
        context_length = min(defaults["context_length"].default, trained_context_length(resolved.header))
        spec = BundleSpec(out.name, context_length, targets=targets)
        builder = builders.load(GENERATION)
        manifest = ship(builder, resolved, adapters, work / "stage", out, spec=spec, progress=progress)
    figures = {name: _figures(manifest, name) for name in folders}
    return Build(out, figures, seconds=round(time.monotonic() - started, 1))


def _say_plan(plan: BuildPlan, progress: Progress) -> None:
    """Report what the build needs, what trains, and why it has the settings that it has."""
    if plan.needs is not None:
        progress.say(f"needs {plan.needs.summary}")
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    duration = None if plan.needs is None else plan.needs.training_time
    progress.say(f"trains on {plan.training_device}{'' if duration is None else f', {duration} in all'}")
    if plan.board is not None:
        progress.say(f"{plan.recipe.device}: {plan.board.reason}")


def _spec_of(prepared: Prepared[Any], builder: Builder[Any], progress: Progress) -> BundleSpec:
    """The settings of the bundle; the first training rows of each task are for calibration."""
    recipe = prepared.plan.recipe
    rows = [row.tokens for item in prepared.adapters for row in item.job.train[:CALIBRATION_ROWS]]
    return BundleSpec(
        recipe.name,
        recipe.context_length,
        recipe.threads,
        recipe.targets,
        recipe.format_options,
        rows,
        merged_quantization=recipe.merged_quantization,
        ships_states=recipe.states == "ship" and builder.keeps_states,
        warms=recipe.states == "start" and builder.keeps_states,
        router=train_router(recipe, [item.task for item in prepared.adapters], progress),
        recipe=recipe.resolved(),
        plan=prepared.plan.for_manifest(),
    )


def _check_keeps(base: Path, out: Path) -> None:
    """UsageError for a base in the bundle `out`, which would be replaced."""
    if out.resolve() in base.resolve().parents:
        message = f"the base {base} is in the bundle {out}, which would be replaced"
        raise UsageError(message, "choose another --out, or add adapters to that bundle with `edgetune build --into`")


def _plan_peft(name: str, folder: Path, targets: tuple[str, ...], system: str | None, *, merged: bool) -> AdapterPlan:
    """The plan of an adapter that was trained elsewhere. Raises what `of_folder` and `find_weights` raise."""
    method, data = MethodSpec.model_validate(methods.of_folder(folder).name), DataSpec(train=BUILT_IN)
    find_weights(folder)
    spec = AdapterSpec(data=data, method=method, system=system or None, merged=merged)
    return plan_export(name, spec, shapes_in(targets, method.name, method.options, merged=merged))


def _from_peft_folder(plan: AdapterPlan, folder: Path, base: Base) -> TrainedAdapter:
    """The adapter in a folder saved by PEFT, with built-in prompts for the parity check."""
    with closing(GgufTokenizer(base.path)) as tokenizer:
        rows = [prompt_tokens(tokenizer, messages_for(probe, plan.spec.system)) for probe in PROBES]
    golden_rows = [TaskRow(BUILT_IN, messages=tuple(messages_for(probe, None))) for probe in PROBES]
    return TrainedAdapter(plan, folder, rows, [len(row) for row in rows], golden_rows=golden_rows)


def _figures(manifest: Manifest, name: str) -> dict[str, Any]:
    """Parity of an adapter, the calibration errors of its confidence, and the size of its files."""
    parity, folder = manifest.adapters[name].parity, f"adapters/{name}/"
    curves = manifest.adapters[name].confidence
    errors = {target: {kind: curve.error for kind, curve in kinds.items()} for target, kinds in curves.items()}
    size = sum(entry.bytes for file, entry in manifest.files.items() if file.startswith(folder))
    return {
        "parity": next(iter(parity.values())),
        "parity_by_target": parity,
        "calibration_error": errors,
        "bytes": size,
    }
