"""Chooses how likely a label must be for a text to be in scope: the runtime answers validation rows.

So the threshold of each format fits its quantization and its engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, Scope
from edgetune_runtime.errors import PromptTooLongError

from edgetune.evaluation import spread
from edgetune.progress import Progress
from edgetune.recipe.parts import OutOfScopeSpec
from edgetune.tasks.data import TaskRow

from .exported import TrainedAdapter
from .opened import opened

MAX_ROWS = 300
"""Rows per adapter and format: more make builds longer, and thresholds little better."""


class _Found(NamedTuple):
    """Whether a row has a label of the task, and the probability of the likeliest one; 0 if it is out of scope."""

    is_known: bool
    chance: float


def with_scopes(bundle: Path, manifest: Manifest, adapters: Sequence[TrainedAdapter], progress: Progress) -> Manifest:
    """The manifest of `bundle` with the scope of each adapter that has `scope_rows`, in each format."""
    rows = {adapter.name: adapter.scope_rows for adapter in adapters if adapter.scope_rows}
    specs = {adapter.name: adapter.plan.spec.out_of_scope for adapter in adapters}
    if not rows:
        return manifest
    progress.say("choosing what is out of scope")
    entries = dict(manifest.adapters)
    for engine, name, runtime in opened(bundle, manifest, rows):
        spec = specs[name]
        assert spec is not None
        scope = _scope(spec, list(_answers(runtime, name, spec.label, rows[name])))
        progress.say(f"  {engine} {name}: {described(scope)}")
        entries[name] = replace(entries[name], scope={**entries[name].scope, engine: scope})
    return replace(manifest, adapters=entries)


def described(scope: Scope) -> str:
    """The figures in words."""
    shares = f"{scope.refused:.1%} of validation rows, and {scope.found:.1%} of other texts"
    return f"{shares}, are {scope.label} (threshold {scope.threshold:.3f})"


def _answers(runtime: Runtime, name: str, label: str, rows: Sequence[TaskRow]) -> Iterator[_Found]:
    known = [row for row in rows if row.completion != label]
    for row in (*spread(known, MAX_ROWS), *(row for row in rows if row.completion == label)):
        with suppress(PromptTooLongError):
            found = runtime.classify(row.messages or (), adapter=name)
            chance = 0.0 if found.label == label else found.probabilities[found.label]
            yield _Found(row.completion != label, chance)


def _scope(spec: OutOfScopeSpec, answers: Sequence[_Found]) -> Scope:
    """The threshold below which are at most as many of the known rows as the recipe allows, and what it does."""
    known = sorted(answer.chance for answer in answers if answer.is_known)
    others = [answer.chance for answer in answers if not answer.is_known]
    threshold = known[int(len(known) * spec.refused)] if known else 0.0
    refused, found = (_share_below(threshold, chances) for chances in (known, others))
    return Scope(spec.label, threshold, refused, found)


def _share_below(threshold: float, chances: Sequence[float]) -> float:
    below = sum(chance < threshold or chance == 0 for chance in chances)
    return round(below / max(1, len(chances)), 4)
