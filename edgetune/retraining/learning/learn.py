"""Trains adapters with the corrections of a log, compares them with the old ones, and packs what got no worse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_export.pack import check_destination
from edgetune_runtime import Runtime
from edgetune_runtime.answer_log.answers import LoggedAnswer, merged
from edgetune_runtime.answer_log.log import file_before
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import CLASSIFICATION, MANIFEST_NAME, Manifest, read_manifest
from edgetune_runtime.errors import NotFoundError, UsageError

from edgetune.building.pipeline import build
from edgetune.common.progress import Progress
from edgetune.common.work_folder import locked, named
from edgetune.methods.common.peft import as_names
from edgetune.methods.lora import LoraOptions, other_option
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import AdapterSpec
from edgetune.report.answers import split_doubt
from edgetune.shipping.existing import gguf_base_of
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import rows_that_fit
from edgetune.tasks.negatives import given
from edgetune.tasks.task import Task, read_task

from .change import Changes, changes_between, scored, sets_of, worse_sets
from .kept import (
    adapter_folders,
    kept_folder,
    load_recipe,
    recipe_beside,
    swap_in_and_keep,
    system_doubt,
    unchanged,
)
from .rows import LearnedRows, TooFewCorrectionsError, compared_rows, doubts, learned_rows, source_of

CORRECTIONS = "corrections"


@dataclass(frozen=True)
class Learned:
    """What learning changed: for each adapter the change on validation rows and on held-out corrections.

    `bundle` is the packed one; None if an adapter got worse. `learned` has the numbers of corrections in training.
    """

    bundle: Path | None
    changes: Changes
    learned: Mapping[str, int]

    @property
    def worse(self) -> list[str]:
        """The adapters that got worse, each with the rows on which it did."""
        return [f"{name} on {kind}" for name, kind in worse_sets(self.changes)]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        changes = {name: {kind: each.to_json() for kind, each in sets.items()} for name, sets in self.changes.items()}
        bundle = None if self.bundle is None else str(self.bundle)
        return {"bundle": bundle, "adapters": changes, "learned": dict(self.learned)}


def read_logs(bundle: Path, logs: Sequence[Path], say: Callable[[str], None]) -> list[LoggedAnswer]:
    """The answers in several logs of a bundle; the last log with a correction of an answer has the last word on it.

    `say` gets a sentence about each line that is left out.
    """
    manifest, entries = read_manifest(bundle), dict[str, LoggedAnswer]()
    for log in current_logs(logs):
        for entry in read_answer_log(log, manifest, say):
            known = entries.get(entry.id)
            # A question that nobody completed says nothing new, and the answer may have been confirmed since.
            if entry.correction or known is None or not known.correction:
                merged(entries, entry)
    return list(entries.values())


def current_logs(logs: Sequence[Path]) -> list[Path]:
    """The logs without the files before them, which are read with them, as their corrections are older."""
    before = {file_before(log).resolve() for log in logs}
    return [log for log in logs if log.resolve() not in before]


def learn(
    bundle: Path, entries: Sequence[LoggedAnswer], recipe: Path | Recipe | None, into: Path | None, progress: Progress
) -> Learned:
    """Train the adapters that have corrections again, with these and the rows of `recipe`.

    Training starts from the adapters as they are, where these were kept. If no adapter got worse, the new bundle takes
    the place of `bundle`, or is `into`. Its recipe, which the next call takes by default, is in `OUT.learn`. Raises
    UsageError for too few corrections, and what `build` raises.
    """
    manifest, out = read_manifest(bundle), named(into or bundle)
    bundle = named(bundle)
    _check_out(out, manifest)
    work = kept_folder(out)
    with locked(work):
        # Users' words are in it.
        work.chmod(0o700)
        corrected = _by_adapter(entries, manifest, progress.say)
        loaded = _recipe_of(bundle, manifest, recipe, corrected)
        tasks = {name: read_task(name, loaded) for name in corrected}
        for name, task in tasks.items():
            if doubt := split_doubt(manifest, task):
                progress.say(f"warning: {name}: {doubt}; its old score may be too high: build again first")
            if doubt := system_doubt(manifest, task):
                progress.say(f"warning: {name}: {doubt}")
        rows, sets = _rows_of(tasks, corrected, bundle, progress), dict[str, dict[str, Sequence[TaskRow]]]()
        specs = {
            name: _started(_spec_to_compare(tasks[name], split), bundle, manifest, tasks[name])
            for name, split in rows.items()
        }
        again = loaded.model_copy(update={"adapters": {**loaded.adapters, **specs}, "route": None})
        for name, split in rows.items():
            for doubt in doubts(tasks[name], split):
                progress.say(f"{name}: {doubt}")
            sets[name] = sets_of(name, compared_rows(tasks[name], split, again), CORRECTIONS, split.held_out, progress)
        staged = work / out.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(bundle, staged)
        build(_of_base(again, bundle, manifest).only(specs), staged, progress=progress, into=True)
        changes = changes_between(*(scored(folder, sets, progress) for folder in (bundle, staged)))
        learned = Learned(out, changes, {name: split.learned for name, split in rows.items()})
        if learned.worse:
            return replace(learned, bundle=None)
        specs = {
            name: _spec(tasks[name], split.train, [*split.validation, *split.held_out]) for name, split in rows.items()
        }
        packed = loaded.model_copy(update={"adapters": {**loaded.adapters, **specs}})
        with unchanged(bundle, manifest, out):
            swap_in_and_keep(packed, [*rows], staged, out)
        return learned


def _check_out(out: Path, manifest: Manifest) -> None:
    """UsageError for a folder that cannot be the new bundle, and for another bundle."""
    check_destination(out)
    if (out / MANIFEST_NAME).exists() and (name := read_manifest(out).name) != manifest.name:
        message = f"{out} is another bundle, {name!r}, not {manifest.name!r}"
        raise UsageError(message, "choose another folder, or delete that one first")


def _rows_of(
    tasks: Mapping[str, Task], corrected: Mapping[str, Sequence[LoggedAnswer]], bundle: Path, progress: Progress
) -> dict[str, LearnedRows]:
    """The rows of the adapters with enough new corrections; the error of the first one if there is none.

    Raises one UsageError for the corrections of all adapters that cannot be answers.
    """
    rows: dict[str, LearnedRows] = {}
    few: list[TooFewCorrectionsError] = []
    refused: list[UsageError] = []
    with Runtime.open(bundle, disk_mb=0) as runtime:
        for name, task in tasks.items():
            try:
                rows[name] = learned_rows(task, corrected[name], partial(rows_that_fit, runtime, name))
            except TooFewCorrectionsError as error:
                few.append(error)
            except UsageError as error:
                refused.append(error)
    if refused:
        raise UsageError("\n".join(error.message for error in refused), refused[0].remedy)
    if not rows:
        raise few[0]
    for left_out in few:
        progress.say(f"not trained again: {left_out.message}")
    return rows


def _started(spec: AdapterSpec, bundle: Path, manifest: Manifest, task: Task) -> AdapterSpec:
    """The section with the bundle's adapter as a start, if the adapter as it was trained is still there and fits."""
    method, plan = spec.method, manifest.plan.get("adapters", {}).get(task.name, {})
    # The head of an encoder has an output for each label.
    if manifest.task == CLASSIFICATION and manifest.adapters[task.name].labels != task.labels:
        return spec
    # The bundle's adapter knows all old rows, so no fold of them would tell how sure it is.
    if isinstance(method.options, LoraOptions) and not method.is_auto and spec.confidence_folds is None:
        for folder in adapter_folders(bundle, task.name):
            modules = {*as_names(plan.get("target_modules") or ())}
            fits = not other_option(folder, method.options) and modules == {*as_names(method.options.target_modules)}
            return spec.model_copy(update={"start_from": str(folder)}) if fits else spec
    return spec


def _recipe_of(bundle: Path, manifest: Manifest, source: Path | Recipe | None, names: Collection[str]) -> Recipe:
    """The recipe of `source`, or else the one beside the bundle, which has these adapters."""
    recipe = recipe_beside(bundle, names) if source is None else load_recipe(source, manifest, {})
    if recipe is None:
        message = f"the old rows of {bundle} are in its recipe, which is not beside it"
        raise NotFoundError(message, "give the recipe")
    unknown = [name for name in names if name not in recipe.adapters]
    if unknown:
        owner = "the given recipe" if isinstance(source, Recipe) else source or f"the recipe of {bundle}"
        message = f"{owner} has no adapter {unknown[0]!r}, of which the log has corrections"
        raise UsageError(message, "give the recipe that trained it")
    return recipe


def _by_adapter(
    entries: Sequence[LoggedAnswer], manifest: Manifest, say: Callable[[str], None]
) -> dict[str, list[LoggedAnswer]]:
    """The corrected answers of each adapter that has some; UsageError if there are none.

    Those of adapters that the bundle no longer has are left out, and named.
    """
    corrected: dict[str, list[LoggedAnswer]] = {}
    for entry in entries:
        if entry.adapter and entry.correction:
            corrected.setdefault(entry.adapter, []).append(entry)
    for name in corrected.keys() - manifest.adapters.keys():
        say(f"left out {len(corrected.pop(name))} corrections of adapter {name!r}, which the bundle does not have")
    if not corrected:
        message = f"none of the {len(entries)} answers in the log is a corrected one of an adapter"
        raise UsageError(message, "correct some on the server's page, or label some with `edgetune learn --ask N`")
    return corrected


def _spec(task: Task, train: Sequence[TaskRow], validation: Sequence[TaskRow]) -> AdapterSpec:
    """The adapter's section of the recipe with these rows, and with what was found in the old ones."""
    rows = {"train": train, "validation": validation}
    if task.spec.data.confidence is not None:
        rows["confidence"] = given(task.confidence_rows)
    sources = {key: source_of(f"{task.name}-{key}", part) for key, part in rows.items()}
    data = task.spec.data.model_copy(update={**sources, "columns": None, "rows": None})
    scope = task.spec.out_of_scope
    labels = tuple(label for label in task.labels if scope is None or label != scope.label) or None
    return task.spec.model_copy(update={"data": data, "metric": task.metric, "labels": labels})


def _spec_to_compare(task: Task, rows: LearnedRows) -> AdapterSpec:
    """The adapter's section without the corrections that are held out, of which no row that a build makes may tell."""
    spec = _spec(task, rows.train, rows.validation)
    if not rows.held_out:
        return spec
    apart = source_of(f"{task.name}-{CORRECTIONS}", rows.held_out)
    return spec.model_copy(update={"data": spec.data.keeping_apart(apart)})


def _of_base(recipe: Recipe, bundle: Path, manifest: Manifest) -> Recipe:
    """The recipe on the bundle's own base, if training can read it: the recipe's may be another after its domain."""
    file = gguf_base_of(manifest)
    if file is None:
        return recipe
    return recipe.model_copy(update={"base": str((bundle / file).absolute()), "domain": None})
