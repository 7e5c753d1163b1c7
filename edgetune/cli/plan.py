"""`edgetune plan`: what a build of a recipe would do, without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from edgetune_runtime.wording import printable

from .arguments import AsJson, Into, Out, RecipePath, Settings, print_json, settings_of
from .tables import print_table

if TYPE_CHECKING:
    from edgetune.planning.records import AdapterPlan, BuildPlan

TrialFlag = Annotated[bool, typer.Option("--trial", help="Train ten steps to estimate the build time.")]

# Titles of the table of adapters: those of texts, and all.
TEXTS = ("adapter", "method", "modules", "shape", "MB", "metric", "answers")
TITLES = (*TEXTS[:5], "trained", "rows", "longest", "steps", *TEXTS[5:])


def plan(
    recipe: RecipePath,
    *,
    out: Out = None,
    into: Into = None,
    trial: TrialFlag = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe, its base and its data, and show what a build will do.

    Reads the base's header and all rows of the data, and checks that the rows keep to their output constraints, that
    the bundle fits on the board, and that this machine has enough memory and disk to build it. Shows the base, adapters
    and files, the memory and disk that the build needs, the time of training at speeds that were measured
    elsewhere, and the speed on the board. Without --trial it downloads no base and trains nothing. A build follows this
    plan and stores it in the bundle's manifest.
    """
    from edgetune.building.into import plan_for
    from edgetune.recipe.model import Recipe

    planned = plan_for(Recipe.from_file(recipe, settings_of(settings)), out, into)
    build_plan, trained = planned.plan, dict[str, Any]()
    if trial:
        from edgetune.building import trial as time_trial
        from edgetune.common.progress import Progress

        loaded = build_plan.recipe
        folder = into or out or loaded.default_out
        build_plan, trained = time_trial.run(loaded, planned, folder, Progress(quiet=as_json))
    if as_json:
        print_json(build_plan.to_json() | ({"trial": trained} if trial else {}))
        return
    lines = [*_summary(build_plan), *_bundle_lines(build_plan), *([("trial", trained["summary"])] if trial else [])]
    for label, text in lines:
        print(printable(f"{label:<14}{text}"))
    print_table(TITLES, map(_cells, build_plan.adapters.values()), texts=TEXTS)


def _summary(build_plan: BuildPlan) -> Iterator[tuple[str, str]]:
    base = build_plan.base
    yield "name", build_plan.recipe.name
    yield "base", base.name
    if build_plan.source is None:
        yield "architecture", "not known before the base is downloaded; nor are sizes, memory, disk and board"
    else:
        yield "architecture", base.architecture or "-"
    yield "board", build_plan.recipe.device or "-" if build_plan.board is None else build_plan.board.reason
    yield "needs", "-" if build_plan.needs is None else build_plan.needs.summary
    yield "trains on", str(build_plan.training_device)
    if build_plan.needs is not None and build_plan.needs.training_time is not None:
        yield "time", f"{build_plan.needs.training_time} of training"
    if build_plan.domain is not None:
        yield "domain", build_plan.domain
    if build_plan.recipe.route is not None:
        yield "router", build_plan.recipe.route.summary(build_plan.recipe.adapters)
    for name, adapter in build_plan.adapters.items():
        if adapter.training_reason:
            yield "training", f"{name}: {adapter.training_reason}"
    for warning in build_plan.warnings:
        yield "warning", warning


def _bundle_lines(build_plan: BuildPlan) -> Iterator[tuple[str, str]]:
    recipe, base = build_plan.recipe, build_plan.base
    yield "formats", ", ".join(recipe.targets)
    yield "context", f"{recipe.context_length} tokens"
    yield "threads", "one per core, at most 8" if recipe.threads is None else str(recipe.threads)
    most = "at most " if base.candidates else ""
    size = "" if base.gguf_bytes is None else f"; {most}{base.gguf_bytes / 1e6:,.0f} MB as GGUF"
    parameters = "" if base.parameters is None else f"; {base.parameters / 1e6:,.1f}M parameters"
    yield "weights", f"{', '.join(base.steps) or 'as they are'}{parameters}{size}"
    if base.candidates:
        yield "to measure", ", ".join(map(str, base.candidates))
    for fit in () if build_plan.board is None else build_plan.board.fits:
        with_adapter, without = fit.speed.adapter_tokens_per_s, fit.speed.decode_tokens_per_s
        speed = f"{with_adapter:.1f} tokens/s with an adapter, {without:.1f} without"
        yield f"on {fit.engine}", f"{fit.kept_mb:.0f} of {fit.available_mb:.0f} MB, {speed}"


def _cells(adapter: AdapterPlan) -> list[str]:
    modules = adapter.target_modules
    named = "-" if modules is None else modules if isinstance(modules, str) else ", ".join(modules)
    about = "about " if adapter.guesses_rank else ""
    rank = f", rank {about}{adapter.rank}" if adapter.rank else ""
    sizes = [f"{about}{size / 1e6:.2f}" for size in adapter.bytes_by_format.values()]
    rows = adapter.rows
    return [
        adapter.name,
        adapter.method,
        f"{named}{rank}",
        ", ".join(dict.fromkeys(adapter.shapes.values())),
        ", ".join(dict.fromkeys(sizes)) or "-",
        "-" if adapter.trainable_parameters is None else f"{adapter.trainable_parameters:,}",
        "-" if rows is None else f"{rows.train} + {rows.validation}",
        "-" if rows is None else f"{rows.longest_tokens}",
        "-" if rows is None else f"{rows.steps}",
        # Of an adapter that the bundle has already, its manifest knows.
        "-" if rows is None else adapter.metric,
        "-"
        if rows is None
        else f"{len(adapter.labels)} labels"
        if adapter.labels
        else adapter.output.kind
        if adapter.output
        else "free",
    ]
