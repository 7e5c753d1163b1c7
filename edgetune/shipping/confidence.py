"""Fits the confidence of a bundle's answers: the runtime answers validation rows with the files that ship.

So the curves of each format include its quantization and its engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgetune_runtime import Runtime
from edgetune_runtime.bundle import ConfidenceCurve, Manifest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.confidence import MAX_LOG_ODDS, confidence

from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.tasks.confidence import MIN_ROWS, RatedAnswer, fit_curves
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import score
from edgetune.tasks.negatives import given, is_made

from .exported import TrainedAdapter
from .opened import opened

MAX_ROWS = 400
"""Answers per adapter and format: more make builds longer, and curves little better."""


def with_confidence(
    bundle: Path, manifest: Manifest, adapters: Sequence[TrainedAdapter], progress: Progress
) -> Manifest:
    """The manifest of `bundle` with the curves of each adapter that has enough `confidence_rows`, in each format.

    Those of its folds, which these answer, count too.
    """
    rows = _rows_of(manifest, adapters, progress)
    if not rows:
        return manifest
    progress.say("fitting the confidence of answers")
    whole = {adapter.name: adapter.whole for adapter in adapters}
    answers = defaultdict[tuple[str, str], list[RatedAnswer]](list)
    failed = set[tuple[str, str]]()
    for engine, name, runtime in opened(bundle, manifest, rows):
        key = engine, whole[name]
        try:
            answers[key] += _rated(runtime, name, rows[name], progress)
        except UsageError as error:
            # Not a reason to lose a trained adapter.
            progress.say(f"  {engine} {name}: no confidence, as {error}")
            failed.add(key)
    entries = dict(manifest.adapters)
    for (engine, name), rated in answers.items():
        if (engine, name) not in failed:
            curves = fit_curves(rated)
            progress.say(f"  {engine} {name}: {described(curves)}")
            rule = entries[name].unsure
            for message in () if rule is None else _never_sure(curves, rule.min_confidence):
                progress.say(f"  {engine} {name}: {message}")
            entries[name] = replace(entries[name], confidence={**entries[name].confidence, engine: curves})
    return replace(manifest, adapters=entries)


def _rows_of(
    manifest: Manifest, adapters: Sequence[TrainedAdapter], progress: Progress
) -> dict[str, Sequence[TaskRow]]:
    """The rows that each adapter answers; none for those that have too few, with their folds."""
    judged = defaultdict[str, dict[str, list[TaskRow]]](dict)
    for adapter in adapters:
        judged[adapter.whole][adapter.name] = list(adapter.confidence_rows)
    rows = dict[str, Sequence[TaskRow]]()
    for name, parts in judged.items():
        count = sum(map(len, parts.values()))
        if count >= MIN_ROWS:
            rows |= shared_out(parts)
        elif count:
            reason = f"{count} rows are too few ({MIN_ROWS} are needed)"
            remedy = "give data.validation or data.confidence, or set confidence_folds: 5"
            progress.say(f"  {name}: no confidence, as {reason}; {remedy}")
    return rows


def shared_out(parts: Mapping[str, Sequence[TaskRow]]) -> dict[str, list[TaskRow]]:
    """About MAX_ROWS rows of all parts, as large a share of each, and at least one of each that has any."""
    share = min(1, MAX_ROWS / sum(map(len, parts.values())))
    return {name: _chosen(rows, max(1, round(share * len(rows)))) for name, rows in parts.items() if rows}


def _chosen(rows: Sequence[TaskRow], most: int) -> list[TaskRow]:
    """At most so many rows, up to a third of them made by the build, as spread over all these would be too few."""
    own, made = given(rows), [*filter(is_made, rows)]
    limit = max(most // 3, most - len(own))
    made = [*spread(made, limit)] if limit else []
    return [*spread(own, most - len(made)), *made]


def _rated(runtime: Runtime, name: str, rows: Sequence[TaskRow], progress: Progress) -> list[RatedAnswer]:
    """An adapter's answers to these rows; UsageError for rows that cannot be scored."""
    return [
        RatedAnswer(row.kind, row.log_odds, row.score >= 1)
        for row in score(runtime, name, rows, progress).details
        if row.kind is not None and row.log_odds is not None
    ]


def _never_sure(curves: Mapping[str, ConfidenceCurve], min_confidence: float) -> Iterator[str]:
    """Which kinds of answers are unsure however sure the model is, and what to do."""
    most = {kind: confidence(curves, kind, MAX_LOG_ODDS) for kind in curves}
    if low := [kind for kind, value in most.items() if value is not None and value < min_confidence]:
        message = f"all {' and '.join(low)} answers are below min_confidence {min_confidence:g}"
        yield f"{message}; lower it, or give more rows for the confidence"
    if unknown := [kind for kind, value in most.items() if value is None]:
        message = f"all {' and '.join(unknown)} answers are unsure, as they have no confidence"
        yield f"{message}; give more such rows for the confidence, or leave out min_confidence"


def described(curves: Mapping[str, ConfidenceCurve]) -> str:
    """The curves of an adapter in words."""
    parts = []
    for kind, curve in curves.items():
        share = f"{curve.right:.1%} of {curve.rows} {kind} answers right"
        error = "too few for a confidence"
        if curve.slope is not None:
            error = f"calibration error {curve.error:.3f} ({curve.error_if_exact:.3f} if exact)"
        parts.append(f"{share}, {error}")
    return "; ".join(parts) or "no complete answers"
