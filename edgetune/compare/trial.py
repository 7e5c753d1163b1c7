"""A Trial in, its Outcome out: build, score and time; `python -m edgetune.compare.trial FOLDER` does it in a process.

A trial has a process of its own, so that no figure is that of an earlier one. What was trained before is not trained
again: the build goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune_devices import boards, fit
from edgetune_export.backends.base import Weights
from edgetune_runtime.errors import IncompatibleError

from edgetune.data import read_rows
from edgetune.evaluate import spread
from edgetune.failure import fail
from edgetune.pipeline import build
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.tasks import read_task

from .figures import OnBoard, TrainingFigures, TrialResult, write_outcome
from .grid import REQUEST_FILE, Trial
from .measure import InTorch, Measured
from .process import end_with_parent


def run(trial: Trial, progress: Progress) -> TrialResult:
    """Do the trial in its folder. Raises what `pipeline.build` and `evaluate.score` raise."""
    folder, recipe = Path(trial.folder), trial.one_task
    bundle, work = folder / "bundle", folder / "bundle.work"
    shared = folder.parents[1] / "shared"
    _share_base(work, shared)
    task = read_task(trial.task, recipe)
    rows = task.validation
    if trial.data is not None:
        rows = read_rows(trial.data, task.spec.data.columns, labels=task.labels or None)
    built = build(recipe, bundle, progress=progress)
    assert built is not None
    measured = Measured(bundle, trial.task, spread(rows, trial.rows), progress)
    scored = {target: measured.score(target) for target in recipe.targets}
    first = scored[recipe.targets[0]]
    assert built.base is not None
    # How int4 is rounded makes no difference to the speed, and gptq would take rows.
    weights = Weights(recipe.onnx.weights)
    torch = InTorch(measured, built.base, built.trained[trial.task], shared, weights, recipe.quantize_merged)
    of_torch = torch.score([row.answer for row in first.details])
    merged = {target: torch.merged_speed(target) for target in recipe.targets}
    return TrialResult(
        name=trial.name,
        method=trial.method,
        rank=trial.rank,
        status="done",
        training=_training(built.adapters[trial.task], work / "train" / trial.task / "log.jsonl"),
        metric=first.metric,
        rows=first.rows,
        torch_score=of_torch.score,
        engines={t: measured.on_engine(t, evaluation, merged[t]) for t, evaluation in scored.items()},
        refused=trial.refused,
        board=_board(recipe, bundle),
        placement=built.adapters[trial.task].get("placement"),
    )


def _share_base(work: Path, shared: Path) -> None:
    """Let the build find the base that was converted or quantized once for all trials."""
    base = work / "base"
    if not base.is_symlink():
        work.mkdir(parents=True, exist_ok=True)
        (shared / "base").mkdir(parents=True, exist_ok=True)
        base.symlink_to(shared / "base", target_is_directory=True)


def _training(figures: Mapping[str, Any], log: Path) -> TrainingFigures:
    points = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    history = tuple((point["epoch"], point["train_loss"], point["val_loss"]) for point in points)
    kept = {key: figures[key] for key in TrainingFigures.__dataclass_fields__ if key != "history"}
    return TrainingFigures(**kept, history=history)


def _board(recipe: Recipe, bundle: Path) -> OnBoard | None:
    """Whether the bundle fits on the recipe's board; None without a board, or where that is not predicted."""
    if recipe.device is None:
        return None
    try:
        needs = fit.needs_of_bundle(bundle)
    except IncompatibleError:
        return None
    found = fit.fit(needs, boards.load(recipe.device))
    return OnBoard(found.device, found.fits, found.needed_mb, found.available_mb)


def main(folder: Path) -> int:
    """Run the trial in `folder`; the exit code is that of the error, which goes to standard error in one line."""
    end_with_parent()
    try:
        trial = Trial.of_json((folder / REQUEST_FILE).read_text(encoding="utf-8"))
        write_outcome(run(trial, Progress()), folder, trial.key)
    except (Exception, KeyboardInterrupt) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
