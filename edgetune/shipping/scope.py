"""Chooses how sure a label must be for a text to be in scope, with the training prompts that texts are compared with.

The runtime answers validation rows, so the threshold of each format fits its quantization and its engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
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
    read_prompts,
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
_LOWEST = -1e6
"""The log odds of a text with the label of those that are out of scope."""


class ScopeAnswer(NamedTuple):
    """Whether a row has a label of the task, and the log odds that it is in scope."""

    is_known: bool
    log_odds: float


def state_basis(head: Floats) -> Floats:
    """The matrix [tokens, width] that maps logits to states of the last layer, from the output layer [vocab, width]."""
    return np.asarray(np.linalg.pinv(head[compared_tokens(len(head))]).T, np.float32)


def with_scopes(
    bundle: Path, manifest: Manifest, adapters: Sequence[TrainedAdapter], basis: Floats | None, progress: Progress
) -> Manifest:
    """The manifest of `bundle` with the scope of each adapter whose recipe asks for it, in each format.

    That of an adapter with folds is chosen by the answers of these too.

    Writes the training prompts to compare with of the adapters that have `compared_rows`, which are those of the first
    format for all. `basis` is that of `state_basis`, None for an encoder, which compares nothing.
    """
    compared = {
        adapter.name: adapter
        for adapter in adapters
        if adapter.scope_rows or (adapter.compared_rows and basis is not None)
    }
    if not compared:
        return manifest
    entries, prompts = dict(manifest.adapters), dict[str, TrainingPrompts]()
    answers = defaultdict[tuple[str, str], list[ScopeAnswer]](list)
    for engine, name, runtime in opened(bundle, manifest, compared):
        adapter, entry = compared[name], entries[name]
        spec = adapter.plan.spec.out_of_scope
        if basis is not None and name not in prompts:
            progress.say(f"computing the states after training prompts of {name}")
            file = f"adapters/{name}/{SIMILARITY_FILE}"
            write_prompts(bundle / file, TrainingPrompts.of(basis, _training_logits(runtime, adapter)))
            # With the rounded states that devices read.
            prompts[name] = read_prompts(bundle / file)
            entries[name] = entry = replace(entry, similarity=file)
        if spec is None:
            continue
        progress.say(f"choosing what is out of scope of {name}")
        answers[engine, adapter.whole] += _answers(runtime, adapter, spec.label, prompts.get(name))
    for (engine, whole), rated in answers.items():
        spec = compared[whole].plan.spec.out_of_scope
        assert spec is not None
        scope = scope_of(spec, rated)
        progress.say(f"  {engine} {whole}: {described(scope)}")
        for adapter in compared.values():
            if adapter.whole == whole:
                entry = entries[adapter.name]
                entries[adapter.name] = replace(entry, scope={**entry.scope, engine: scope})
    return replace(manifest, adapters=entries)


def described(scope: Scope) -> str:
    """The figures in words."""
    shares = f"{scope.refused:.1%} of validation rows, and {scope.found:.1%} of other texts"
    limit = "" if scope.threshold == _LOWEST else f" (threshold {scope.threshold:.2f})"
    return f"{shares}, are {scope.label}{limit}"


def _training_logits(runtime: Runtime, adapter: TrainedAdapter) -> Iterator[tuple[str, Logits]]:
    """The labels of some training prompts, as many of each, and the logits after them."""
    by_label: dict[str, list[TaskRow]] = {}
    for row in adapter.compared_rows:
        by_label.setdefault(row.completion or "", []).append(row)
    count = max(_LEAST_PER_LABEL, MAX_ROWS // max(1, len(by_label)))
    rows = [(name, row) for name, own in by_label.items() for row in spread(own, count)]
    for name, row in spread(rows, MAX_PROMPTS):
        with suppress(PromptTooLongError):
            yield name, logits_after(runtime, row.messages or (), adapter.name)


def _answers(
    runtime: Runtime, adapter: TrainedAdapter, label: str, prompts: TrainingPrompts | None
) -> Iterator[ScopeAnswer]:
    known = [row for row in adapter.scope_rows if row.completion != label]
    others = [row for row in adapter.scope_rows if row.completion == label]
    for row in (*spread(known, MAX_ROWS), *spread(others, MAX_ROWS)):
        messages = row.messages or ()
        with suppress(PromptTooLongError):
            found = runtime.classify(messages, adapter=adapter.name)
            odds = found.log_odds
            if found.label == label:
                odds = _LOWEST
            elif prompts is not None:
                odds = prompts.similarities(logits_after(runtime, messages, adapter.name)).scope_log_odds(odds)
            yield ScopeAnswer(row.completion != label, odds)


def scope_of(spec: OutOfScopeSpec, answers: Sequence[ScopeAnswer]) -> Scope:
    """The threshold below which are at most as many of the known rows as the recipe allows, and what it does."""
    known = sorted(answer.log_odds for answer in answers if answer.is_known)
    others = [answer.log_odds for answer in answers if not answer.is_known]
    place = int(len(known) * spec.refused)
    threshold = known[place] if known else _LOWEST
    if place and known[place - 1] != _LOWEST:
        # Midway, so that rounding refuses no more of them: the states are those of the first format.
        threshold = (known[place - 1] + threshold) / 2
    elif known and threshold != _LOWEST:
        # Below the first row that may not be refused, for the same reason.
        threshold -= 0.01
    refused, found = (_share_below(threshold, odds) for odds in (known, others))
    return Scope(spec.label, threshold, refused, found)


def _share_below(threshold: float, log_odds: Sequence[float]) -> float:
    below = sum(odds < threshold or odds == _LOWEST for odds in log_odds)
    return round(below / max(1, len(log_odds)), 4)
