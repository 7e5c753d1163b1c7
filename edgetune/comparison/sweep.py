"""Runs a comparison: every trial that is not finished yet, then writes compare.json, the page and the plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edgetune_runtime.errors import CancelledError, EdgetuneError, IncompatibleError, UsageError

from edgetune import bases
from edgetune.building.decoder.importance import requested_importance
from edgetune.building.decoder.quantization import choose_quantization
from edgetune.common.files import write_file
from edgetune.common.progress import Progress
from edgetune.common.work_folder import locked
from edgetune.planning.build import plan_bundle
from edgetune.planning.quantization import quantizations_of
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_of
from edgetune.tasks.data import read_rows
from edgetune.tasks.metrics import checked_answers
from edgetune.tasks.negatives import given
from edgetune.tasks.plain_prompts import answered_prompts, plain_prompt
from edgetune.tasks.task import Task, read_task

from .comparison import Comparison
from .figures import TrialResult, goodness, read_outcome
from .grid import Request, Trial, recipe_of, trials_of
from .recommend import recommend

Run = Callable[[Sequence[Trial], Progress], Iterator[TrialResult]]
"""Runs trials and yields their outcomes as they finish; a failed trial also has an outcome."""


def compare(request: Request, run: Run, progress: Progress) -> Comparison:
    """Run the trials that are not finished, and write compare.json, compare.html and the plots to `request.out`.

    A failed trial gets a row with the reason, and the others continue. Raises UsageError and NotFoundError for errors
    in the request and if another process uses `request.out`, before any training; CancelledError when the user
    interrupts, with finished trials kept; EdgetuneError, after everything is written, if no trial succeeded.
    """
    with locked(request.out):
        recipe, trials, source = _prepared(request, progress)
        comparison = _compared(request, recipe.base, source, _outcomes(trials, run, progress))
        write(comparison, request.out)
        shutil.rmtree(request.out / "shared" / "structure", ignore_errors=True)
    _check_any(comparison.outcomes)
    return comparison


def _outcomes(trials: Sequence[Trial], run: Run, progress: Progress) -> list[TrialResult]:
    """The outcomes of all trials, after those that are not finished have run."""
    todo = [trial for trial in trials if not trial.is_refused]
    outcomes = {trial.name: outcome for trial in todo if (outcome := read_outcome(Path(trial.folder), trial.key))}
    for name in outcomes:
        progress.say(f"{name} is already finished")
    try:
        for outcome in run([trial for trial in todo if trial.name not in outcomes], progress):
            outcomes[outcome.name] = outcome
            progress.say(f"{outcome.name}: {summary(outcome)}")
    except KeyboardInterrupt as error:
        message = f"comparison stopped with {len(outcomes)} of {len(todo)} trials finished"
        raise CancelledError(message, "run the same command to resume") from error
    refused = {
        trial.name: trial.without_figures("refused", next(iter(trial.refused.values())))
        for trial in trials
        if trial.is_refused
    }
    return [(outcomes | refused)[trial.name] for trial in trials]


def check_folder(out: Path) -> None:
    """UsageError if `out` is something else than a folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder", "choose another folder")


def write(comparison: Comparison, out: Path) -> None:
    """Write compare.json, the plots and the page."""
    from .page import page  # noqa: PLC0415 - matplotlib is slow to import
    from .plots import plots  # noqa: PLC0415

    write_file(out / "compare.json", json.dumps(comparison.to_json(), indent=2, ensure_ascii=False) + "\n")
    pictures = plots(comparison.outcomes, out)
    write_file(out / "compare.html", page(comparison, pictures))


def summary(outcome: TrialResult) -> str:
    """An outcome in one line."""
    if outcome.status != "done":
        return f"{outcome.status}: {outcome.reason}"
    scores = ", ".join(f"{figures.score:.4g} in {target}" for target, figures in outcome.engines.items())
    return f"{outcome.metric} {scores}, {outcome.torch_score:.4g} before export"


def _prepared(request: Request, progress: Progress) -> tuple[Recipe, list[Trial], str]:
    """The recipe, the trials, and what is said of the rows to score, after checking the request and its data.

    Prepares the base once for all trials.
    """
    recipe = recipe_of(request)
    task = read_task(request.task, recipe)
    most, there_are = max(request.rows, default=0), len(given(task.train))
    if most > there_are:
        message = f"{most} rows are more than the {there_are} training rows of {request.task}"
        raise UsageError(message, f"use at most {there_are}")
    scored = _source(request.data, task)
    source = bases.find(recipe, download=True)
    assert source is not None
    quantization = quantizations_of(recipe)[0]
    work = request.out / "shared" / "base"
    is_measured = recipe.quantization_spec is not None
    if is_measured or (recipe.device is not None and quantization is not None):
        plan = plan_bundle(recipe, source, shapes_of(recipe))
        measured = choose_quantization(plan, [task], work, progress, None) if is_measured else None
        quantization = measured if is_measured else plan.base.quantization
        # All trials get the same base, and a folder is converted once.
        request = replace(request, settings={**request.settings, "quantization": quantization})
        recipe = recipe.model_copy(update={"quantization": quantization})
    importance = requested_importance(recipe, progress)
    base = bases.make(source, quantization, work=work, progress=progress, converter=None, importance=importance)
    if importance is not None:
        # The matrix of fewer rows would make another base.
        base_keys = {"base": str(base.path.absolute()), "quantization": None, "imatrix": None}
        request = replace(request, settings={**request.settings, **base_keys})
    return recipe, trials_of(request, recipe, base.fingerprint), scored


def _source(data: str | None, task: Task) -> str:
    """The rows to score, with how many of them say little."""
    if data is None:
        if not task.validation_answers:
            message = f"none of {len(task.validation)} validation rows of {task.name!r} can be scored by {task.metric}"
            raise UsageError(message, "give rows with --data, or choose another metric")
        return "its validation data"
    rows = read_rows(data, task.spec.data.columns, labels=task.labels or None)
    scored = checked_answers(rows, task.metric)
    learned = answered_prompts(task.trained_rows)
    both = sum(plain_prompt(answer) in learned for answer in scored)
    doubt = (
        f" ({both} of {len(scored)} answers are to prompts of training rows, so the scores say little)" if both else ""
    )
    return f"{Path(data).name}{doubt}"


def _compared(request: Request, base: str, source: str, outcomes: Sequence[TrialResult]) -> Comparison:
    finished = [outcome for outcome in outcomes if outcome.status == "done"]
    first = finished[0] if finished else None
    ordered = [*sorted(finished, key=_best, reverse=True), *(o for o in outcomes if o.status != "done")]
    metric, rows = (first.metric, first.rows) if first else ("", 0)
    most = max((outcome.trained_rows for outcome in finished), default=0)
    chosen = recommend([outcome for outcome in finished if outcome.trained_rows == most])
    return Comparison(request.task, base, metric, rows, source, ordered, chosen)


def _best(outcome: TrialResult) -> float:
    return max(goodness(outcome.metric, figures.score) for figures in outcome.engines.values())


def _check_any(outcomes: Sequence[TrialResult]) -> None:
    if any(outcome.status == "done" for outcome in outcomes):
        return
    first = outcomes[0]
    kind = IncompatibleError if first.status == "refused" else EdgetuneError
    raise kind(f"none of {len(outcomes)} trials succeeded; {first.name}: {first.reason}")
