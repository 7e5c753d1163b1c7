"""Trains the adapters of a bundle again on another base, compares both bundles, and packs what got no worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_export.pack import check_destination
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.bundle_files import remove_from_bundle

from edgetune.building import builders
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build, with_download
from edgetune.common.progress import Progress
from edgetune.common.work_folder import beside, locked, named, work_folder
from edgetune.curation.checking.findings import TEST
from edgetune.planning.records import BasePlan, BuildPlan
from edgetune.recipe.rows import Rows
from edgetune.report.answers import split_doubt
from edgetune.report.facts import facts_of
from edgetune.retraining.learning.change import Changes, changes_between, scored, sets_of, worse_sets
from edgetune.retraining.learning.kept import kept_folder, swap_in_and_keep, system_doubt, unchanged
from edgetune.shipping.exported import BuildBase
from edgetune.tasks.evaluation import rows_for

from .recipe import RecipeSource, recipe_for

TestData = Mapping[str, str | Path | Rows]
"""Test rows by the name of their adapter."""


@dataclass(frozen=True)
class BundleFigures:
    """What a bundle is made of, in the format that the runtime opens by default; sizes in MB, 10^6 bytes."""

    base: str
    quantization: str
    parameters: int
    base_mb: float
    adapters_mb: Mapping[str, float]
    total_mb: float


@dataclass(frozen=True)
class Rebased:
    """A bundle on another base: `bundle` is the packed one, or None.

    `changes` has the change of each adapter on its validation and its test rows, `before` and `after` the figures of
    both bundles as they were trained. An adapter is worse if its score fell by more than `margin` standard errors;
    `left_out` are those that were worse and are not in the packed bundle.
    """

    bundle: Path | None
    changes: Changes
    before: BundleFigures
    after: BundleFigures
    margin: float
    left_out: tuple[str, ...] = ()

    @property
    def worse(self) -> list[str]:
        """The adapters that got worse, each with the rows on which it did."""
        return [f"{name} on {kind}" for name, kind in worse_sets(self.changes, self.margin)]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "bundle": None if self.bundle is None else str(self.bundle),
            "margin": self.margin if math.isfinite(self.margin) else None,
            "left_out": list(self.left_out),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "adapters": {
                name: {kind: each.to_json(self.margin) for kind, each in sets.items()}
                for name, sets in self.changes.items()
            },
        }


def rebase(
    bundle: Path,
    out: Path,
    source: RecipeSource,
    data: TestData,
    *,
    progress: Progress,
    margin: float = 1.0,
    without_worse: bool = False,
    converter: Path | None = None,
) -> Rebased:
    """Train all adapters of `bundle` on the base of `source`, and pack the result as `out` if none got worse.

    Both bundles answer the validation rows, and the test rows in `data`. With `without_worse`, adapters that got worse
    are left out, as long as one remains. Work is in `OUT.rebase`, where a stopped call resumes and a bundle that was
    not packed stays. Raises what `recipe_for`, `rows_for` and `build` raise; what can be known before is raised before
    any training.
    """
    if not margin >= 0:
        raise UsageError(f"the margin is {margin} standard errors", "use a number of at least 0")
    manifest, bundle, out = read_manifest(bundle), named(bundle), named(out)
    check_destination(out)
    work = beside(out, ".rebase")
    staged = work / out.name
    recipe = recipe_for(bundle, manifest, source)
    tests = {name: rows_for(manifest, name, rows)[0] for name, rows in data.items()}
    with locked(work):
        planned = plan_build(recipe, staged)
        for task in planned.tasks:
            if doubt := split_doubt(manifest, task):
                progress.say(f"warning: {task.name}: {doubt}; its old score may be too high: give test rows")
            if doubt := system_doubt(manifest, task):
                progress.say(f"warning: {task.name}: {doubt}")
        sets = {
            task.name: sets_of(task.name, task.validation_answers, TEST, tests.get(task.name, ()), progress)
            for task in planned.tasks
        }
        if planned.plan.source is None:
            planned = with_download(planned, staged)
        plan = planned.plan
        # A base after more pretraining is known only after it.
        base = None if manifest.base.domain else _base_of(plan, work_folder(staged), progress, converter)
        if base is not None and base.fingerprint == manifest.base.fingerprint:
            raise _same_base(plan.base, bundle)
        before = scored(bundle, sets, progress)
        build(recipe, staged, progress=progress, converter=converter)
        changes = changes_between(before, scored(staged, sets, progress))
        figures = figures_of(bundle), figures_of(staged)
        worse = tuple(dict.fromkeys(name for name, _ in worse_sets(changes, margin)))
        if worse and (not without_worse or len(worse) == len(sets)):
            return Rebased(None, changes, *figures, margin)
        for name in worse:
            remove_from_bundle(staged, name)
        # A `learn` of this bundle changes the same files.
        with locked(kept_folder(out)), unchanged(bundle, manifest, out):
            swap_in_and_keep(recipe, [name for name in sets if name not in worse], staged, out)
        return Rebased(out, changes, *figures, margin, worse)


def figures_of(bundle: Path) -> BundleFigures:
    """The figures of a bundle, from its manifest and its files."""
    manifest = read_manifest(bundle)
    facts, target = facts_of(bundle, manifest), next(iter(manifest.base.files))
    adapters_mb = {item.entry.name: item.mb[target] for item in facts.adapters}
    about = manifest.base.name, manifest.base.types_in(target), manifest.base.parameters
    return BundleFigures(*about, facts.base_mb[target], adapters_mb, facts.total_mb)


def _base_of(plan: BuildPlan, work: Path, progress: Progress, converter: Path | None) -> BuildBase | None:
    """The planned base, which the build then finds in `work`; None if quantizations have to be measured first."""
    if plan.base.candidates:
        return None
    with locked(work):
        base: BuildBase = builders.load(plan.recipe.task).make_base(plan, work, progress, converter)
        return base


def _same_base(plan: BasePlan, bundle: Path) -> UsageError:
    form = "" if plan.quantization is None else f" in {plan.quantization}"
    message = f"{plan.name!r}{form} is the base that {bundle} has already"
    return UsageError(message, "give another base or quantization, or train again with edgetune build")
