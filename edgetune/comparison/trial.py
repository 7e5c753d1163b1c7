"""Builds, scores and times one trial; `python -m edgetune.comparison.trial FOLDER` runs it as a process.

Each trial has its own process, so that earlier trials do not affect its figures. An interrupted build resumes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgetune_devices import boards, fit
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.sizing.needs import needs_of_bundle

from edgetune.bases import Base
from edgetune.building.pipeline import build
from edgetune.common.failure import fail
from edgetune.common.module_process import end_with_parent, read_request
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.recipe.model import Recipe
from edgetune.tasks.data import read_rows
from edgetune.tasks.metrics import answers_to_score
from edgetune.tasks.negatives import given
from edgetune.tasks.task import read_task
from edgetune.training.job import Point, TrainResult

from .figures import BoardFit, TrialResult, write_outcome
from .grid import Trial
from .measure import BundleMeasurement, TorchMeasurement


def run(trial: Trial, progress: Progress) -> TrialResult:
    """Run the trial in its folder. Raises what `check_unchanged`, `pipeline.build` and `evaluate.score` raise."""
    trial.check_unchanged()
    folder, recipe = Path(trial.folder), trial.one_task
    bundle, work = folder / "bundle", folder / "bundle.work"
    shared = folder.parents[1] / "shared"
    _share_base(work, shared)
    task = read_task(trial.task, recipe)
    if trial.data is None:
        rows = task.validation_answers
    else:
        test = read_rows(trial.data, task.spec.data.columns, labels=task.labels or None)
        rows = answers_to_score(test, task.metric)
    built = build(recipe, bundle, progress=progress)
    measured = BundleMeasurement(bundle, trial.task, spread(rows, trial.limit), progress)
    scored = {target: measured.score(target) for target in recipe.targets}
    first = scored[recipe.targets[0]]
    assert isinstance(built.base, Base)
    torch = TorchMeasurement(measured, built.base, built.trained[trial.task], shared, recipe)
    in_torch = torch.score([row.written for row in first.details])
    merged = {target: torch.merged_speed(target) for target in recipe.targets}
    return TrialResult(
        name=trial.name,
        method=trial.method,
        rank=trial.rank,
        status="done",
        training=_training(built.figures[trial.task], built.losses[trial.task]),
        metric=first.metric,
        rows=first.rows,
        trained_rows=len(given(task.train)),
        torch_score=in_torch.score,
        engines={t: measured.on_engine(t, evaluation, merged[t]) for t, evaluation in scored.items()},
        refused=trial.refused,
        board=_board(recipe, bundle),
        placement=built.figures[trial.task].get("placement"),
    )


def _share_base(work: Path, shared: Path) -> None:
    """Link the converted or quantized base that all trials share into the build's work folder."""
    base = work / "base"
    if not base.exists():
        work.mkdir(parents=True, exist_ok=True)
        (shared / "base").mkdir(parents=True, exist_ok=True)
        # A comparison's folder may be moved, and an older link then leads nowhere.
        base.unlink(missing_ok=True)
        base.symlink_to(os.path.relpath((shared / "base").resolve(), work.resolve()), target_is_directory=True)


def _training(figures: Mapping[str, Any], losses: Iterable[Point]) -> TrainResult:
    keys = TrainResult.__dataclass_fields__.keys() - {"history"}
    return TrainResult(**{key: figures[key] for key in keys}, history=[*losses])


def _board(recipe: Recipe, bundle: Path) -> BoardFit | None:
    """Whether the bundle fits on the recipe's board; None without a board or if it cannot be predicted."""
    if recipe.device is None:
        return None
    try:
        needs = needs_of_bundle(bundle)
    except IncompatibleError:
        return None
    predicted = fit.fit(needs, boards.load(recipe.device))
    return BoardFit(predicted.device, predicted.fits, predicted.needed_mb, predicted.available_mb)


def main(folder: Path) -> int:
    """Run the trial in `folder` and return the exit code; an error is printed as one line on standard error."""
    end_with_parent()
    try:
        trial = Trial(**read_request(folder))
        write_outcome(run(trial, Progress()), folder, trial.key)
    except (Exception, KeyboardInterrupt) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
