"""`edgetune report BUNDLE`: one HTML page about the training, the answers and the boards of a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import BundlePath, Quiet, data_option, output_option, pairs_of
from .evaluate import shortened

if TYPE_CHECKING:
    from edgetune_runtime.bundle import Manifest

    from edgetune.evaluation import Evaluation, ScoredRow
    from edgetune.progress import Progress
    from edgetune.report.facts import Answer, Score

SHOWN_ANSWERS = 3
"""Right answers per adapter, and wrong ones."""


def report(
    bundle: BundlePath,
    *,
    out: Annotated[Path, output_option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    recipe: Annotated[
        Path | None, data_option(metavar="RECIPE", help="The bundle's recipe: answer validation rows of it.")
    ] = None,
    data: Annotated[
        list[str] | None, data_option(metavar="NAME=FILE", help="Rows for an adapter to answer instead; repeatable.")
    ] = None,
    limit: Annotated[int, data_option(min=1, metavar="N", help="Answer at most N rows per adapter.")] = 40,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--score", metavar="NAME=FILE", help="An adapter's score, from `edgetune evaluate --json`; repeatable."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write an HTML report on a bundle.

    The report is one file without scripts or links: methods, data, loss curves, right and wrong answers, scores,
    parity, sizes, and the boards that the bundle fits on. Answers need --recipe or --data.
    """
    from edgetune_runtime.bundle import read_manifest  # noqa: PLC0415
    from edgetune_runtime.formats.atomic import replacing  # noqa: PLC0415 - help needs none of it

    from edgetune.progress import Progress  # noqa: PLC0415
    from edgetune.report.facts import facts_of, fits_of, scores_of  # noqa: PLC0415
    from edgetune.report.render import page  # noqa: PLC0415

    manifest = read_manifest(bundle)
    found = scores_of((name, Path(file)) for name, file in pairs_of(scores or (), "--score", "NAME=FILE").items())
    files = pairs_of(data or (), "--data", "NAME=FILE")
    for name in (*found, *files):
        manifest.adapter(name)
    found |= _answered(bundle, recipe, files, limit=limit, progress=Progress(quiet=quiet))
    facts = facts_of(bundle, manifest, found)
    with replacing(out) as temporary:
        temporary.write_text(page(facts, fits_of(bundle, manifest)), encoding="utf-8")
    print(out)


def _answered(
    bundle: Path, recipe: Path | None, files: Mapping[str, str], *, limit: int, progress: Progress
) -> dict[str, Score]:
    """The scores and answers of the adapters in `files`, and of the others of the recipe on its validation rows."""
    from edgetune_runtime import Runtime  # noqa: PLC0415 - as above
    from edgetune_runtime.bundle import read_manifest  # noqa: PLC0415

    from edgetune.evaluation import evaluate, score, spread  # noqa: PLC0415
    from edgetune.recipe.model import Recipe  # noqa: PLC0415
    from edgetune.tasks.task import read_task  # noqa: PLC0415

    tasks = []
    if recipe is not None:
        manifest = read_manifest(bundle)
        adapters = Recipe.from_file(recipe).adapters
        names = [name for name in adapters if name in manifest.adapters and name not in files]
        loaded = Recipe.from_file(recipe, _split_of(manifest, names))
        tasks = [read_task(name, loaded) for name in names]
    found = {}
    if tasks:
        with Runtime.open(bundle, disk_mb=0) as runtime:
            for task in tasks:
                evaluation = score(runtime, task.name, spread(task.validation, limit), progress)
                found[task.name] = _score(evaluation, "its validation data, which also chose the checkpoint")
    for name, file in files.items():
        found[name] = _score(evaluate(bundle, name, file, limit=limit, progress=progress), Path(file).name)
    return found


def _split_of(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """The settings of the build that decide which rows it held out, as overrides of its recipe."""
    adapters = manifest.recipe.get("adapters", {})
    seed = manifest.recipe.get("training", {}).get("seed", 0)
    settings = {}
    for name in names:
        adapter = adapters.get(name, {})
        settings[f"adapters.{name}.training.seed"] = adapter.get("training", {}).get("seed", seed)
        settings[f"adapters.{name}.data.held_out"] = adapter.get("data", {}).get("held_out", 0.1)
    return settings


def _score(evaluation: Evaluation, source: str) -> Score:
    """What the report shows of an evaluation; a perplexity has no answers."""
    from edgetune.report.facts import Score  # noqa: PLC0415 - as above

    score = Score(evaluation.metric, evaluation.score, evaluation.rows, source)
    if evaluation.metric == "perplexity":
        return score
    rows = sorted(evaluation.details, key=lambda row: -row.score)
    best = rows[: math.ceil(len(rows) / 2)] if score.is_graded else [row for row in rows if row.score >= 1]
    worst = [row for row in reversed(rows) if row not in best and row.score < 1]
    return replace(
        score,
        points=[row.score for row in rows],
        best=_shown(best),
        worst=_shown(worst),
    )


def _shown(rows: Sequence[ScoredRow]) -> list[Answer]:
    """The first answers to different prompts."""
    from edgetune.report.facts import Answer  # noqa: PLC0415 - as above

    first = list({row.prompt: row for row in reversed(rows)}.values())[::-1][:SHOWN_ANSWERS]
    return [Answer(shortened(row.prompt), shortened(row.answer), shortened(row.reference)) for row in first]
