"""Chooses how sure a label must be for a text to be in scope: the runtime answers validation rows.

So the threshold of each format fits its quantization and its engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import pstdev
from typing import NamedTuple

import numpy as np
from edgetune_export.adapters.shapes import Floats
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, Scope
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.errors import PromptTooLongError
from edgetune_runtime.inference.measuring import logits_after
from edgetune_runtime.inference.similarity import (
    MAX_PROMPTS,
    SIMILARITY_FILE,
    TrainingPrompts,
    compared_tokens,
    write_prompts,
)

from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.recipe.parts import OutOfScopeSpec
from edgetune.tasks.data import TaskRow

from .exported import TrainedAdapter
from .opened import opened

MAX_ROWS = 300
"""Rows of each kind per adapter and format: more make builds longer, and thresholds little better."""
_LEAST_PER_LABEL = 3
"""Training prompts of each label to compare with, where MAX_ROWS are fewer: a label may have several kinds of texts."""
_SMALLEST_SPREAD = 1e-3
_LOWEST = -1e6
"""The score of a text with the label of those that are out of scope."""


class ScopeAnswer(NamedTuple):
    """Whether a row has a label of the task, whether it got one, how likely this is, and how similar the prompt is."""

    is_known: bool
    is_labelled: bool
    log_odds: float
    similarity: float


def state_basis(head: Floats) -> Floats:
    """The matrix [tokens, width] that maps logits to states of the last layer, from the output layer [vocab, width]."""
    return np.asarray(np.linalg.pinv(head[compared_tokens(len(head))]).T, np.float32)


def with_scopes(
    bundle: Path, manifest: Manifest, adapters: Sequence[TrainedAdapter], basis: Floats | None, progress: Progress
) -> Manifest:
    """The manifest of `bundle` with the scope of each adapter that has `scope_rows`, in each format.

    Writes the training prompts of these adapters to compare with, which are those of the first format for all. `basis`
    is that of `state_basis`, None for an encoder.
    """
    scoped = {adapter.name: adapter for adapter in adapters if adapter.scope_rows}
    if not scoped:
        return manifest
    progress.say("choosing what is out of scope")
    entries, prompts = dict(manifest.adapters), dict[str, TrainingPrompts]()
    for engine, name, runtime in opened(bundle, manifest, scoped):
        adapter, entry = scoped[name], entries[name]
        spec = adapter.plan.spec.out_of_scope
        assert spec is not None
        if basis is not None and name not in prompts:
            prompts[name] = TrainingPrompts.of(basis, _training_logits(runtime, adapter, spec.label))
            file = f"adapters/{name}/{SIMILARITY_FILE}"
            write_prompts(bundle / file, prompts[name])
            entry = replace(entry, similarity=file)
        answers = list(_answers(runtime, adapter, spec.label, prompts.get(name)))
        scope = scope_of(spec, answers)
        progress.say(f"  {engine} {name}: {described(scope)}")
        entries[name] = replace(entry, scope={**entry.scope, engine: scope})
    return replace(manifest, adapters=entries)


def described(scope: Scope) -> str:
    """The figures in words."""
    shares = f"{scope.refused:.1%} of validation rows, and {scope.found:.1%} of other texts"
    limit = "" if scope.threshold == _LOWEST else f" (threshold {scope.threshold:.2f})"
    return f"{shares}, are {scope.label}{limit}"


def _training_logits(runtime: Runtime, adapter: TrainedAdapter, label: str) -> Iterator[tuple[str, Logits]]:
    """The labels of some training prompts, as many of each, and the logits after them."""
    by_label: dict[str, list[TaskRow]] = {}
    for row in adapter.known_rows:
        if row.completion is not None and row.completion != label:
            by_label.setdefault(row.completion, []).append(row)
    count = max(_LEAST_PER_LABEL, MAX_ROWS // max(1, len(by_label)))
    rows = [(name, row) for name, own in by_label.items() for row in spread(own, count)]
    for name, row in spread(rows, MAX_PROMPTS):
        with suppress(PromptTooLongError):
            yield name, logits_after(runtime, row.messages or (), adapter.name)


def _answers(
    runtime: Runtime, adapter: TrainedAdapter, label: str, prompts: TrainingPrompts | None
) -> Iterator[ScopeAnswer]:
    in_scope = [row for row in adapter.scope_rows if row.completion != label]
    out_of_scope = [row for row in adapter.scope_rows if row.completion == label]
    for row in (*spread(in_scope, MAX_ROWS), *spread(out_of_scope, MAX_ROWS)):
        messages, similarity = row.messages or (), 1.0
        with suppress(PromptTooLongError):
            classification = runtime.classify(messages, adapter=adapter.name)
            if prompts is not None:
                similarity = max(prompts.similarities(logits_after(runtime, messages, adapter.name)).values())
            yield ScopeAnswer(
                row.completion != label, classification.label != label, classification.log_odds, similarity
            )


def scope_of(spec: OutOfScopeSpec, answers: Sequence[ScopeAnswer]) -> Scope:
    """The threshold below which are at most as many of the known rows as the recipe allows, and what it does."""
    labelled = [answer for answer in answers if answer.is_known and answer.is_labelled]
    log_odds, similarities = ([answer.log_odds for answer in labelled], [answer.similarity for answer in labelled])
    scope = Scope(spec.label, _LOWEST, 0.0, 0.0, _spread_of(log_odds), _spread_of(similarities))

    def score(answer: ScopeAnswer) -> float:
        return scope.score(answer.log_odds, answer.similarity) if answer.is_labelled else _LOWEST

    known = sorted(score(answer) for answer in answers if answer.is_known)
    others = [score(answer) for answer in answers if not answer.is_known]
    threshold = known[int(len(known) * spec.refused)] if known else _LOWEST
    refused, found = (_share_below(threshold, scores) for scores in (known, others))
    return replace(scope, threshold=threshold, refused=refused, found=found)


def _spread_of(values: Sequence[float]) -> float:
    return max(_SMALLEST_SPREAD, pstdev(values)) if values else 1.0


def _share_below(threshold: float, scores: Sequence[float]) -> float:
    below = sum(score < threshold or score == _LOWEST for score in scores)
    return round(below / max(1, len(scores)), 4)
