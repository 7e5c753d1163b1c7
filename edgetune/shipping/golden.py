"""Chooses the golden answers of a bundle: for each adapter and format one prompt, and what the runtime answers to it.

Engines round differently on another processor, which may decide a near tie otherwise. So of a few rows the one is
chosen whose answer is furthest from one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from edgetune_export.adapters.shapes import Floats
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import GoldenAnswer, Manifest
from edgetune_runtime.decoding.constraint import Constraint
from edgetune_runtime.errors import PromptTooLongError
from edgetune_runtime.inference.golden import ask, options_of
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.inference.options import split_options

from edgetune.common.progress import Progress
from edgetune.tasks.data import TaskRow

from .exported import TrainedAdapter
from .opened import opened

MAX_TOKENS = 24
"""Length of the answers: long enough to show a wrong file, and with few steps that could be near ties."""
_TEXT_CHARACTERS = 80


def with_golden(bundle: Path, manifest: Manifest, adapters: Sequence[TrainedAdapter], progress: Progress) -> Manifest:
    """The manifest of `bundle` with a golden answer for each adapter that has `golden_rows`, in each format."""
    rows = {adapter.name: adapter.golden_rows for adapter in adapters if adapter.golden_rows}
    if not rows:
        return manifest
    progress.say("storing a golden answer per adapter")
    entries = dict(manifest.adapters)
    for engine, name, runtime in opened(bundle, manifest, rows, cache_mb=0):
        golden = _golden(runtime, name, rows[name])
        if golden is None:
            progress.say(f"  {engine} {name}: no golden answer, as no row fits in {manifest.context_length} tokens")
            continue
        entries[name] = replace(entries[name], golden={**entries[name].golden, engine: golden})
    return replace(manifest, adapters=entries)


def _golden(runtime: Runtime, name: str, rows: Sequence[TaskRow]) -> GoldenAnswer | None:
    """The answer with the largest margin to one of the rows; None if none of them fits in the context."""
    margin_of = _label_margin if runtime.manifest.adapter(name).labels else _token_margin
    candidates = []
    for question in map(_question, rows):
        with suppress(PromptTooLongError):
            candidates.append((*margin_of(runtime, name, question), question))
    if not candidates:
        return None
    # An empty answer shows little.
    _, margin, question = max(candidates, key=lambda candidate: candidate[:2])
    answer = ask(runtime, name, question)
    return replace(question, answer=answer, margin=round(margin, 3) if math.isfinite(margin) else None)


def _question(row: TaskRow) -> GoldenAnswer:
    """The row's prompt, without an answer."""
    prompt: str | tuple[dict[str, Any], ...]
    prompt = (row.text or "")[:_TEXT_CHARACTERS] if row.messages is None else tuple(map(dict, row.messages))
    tools = None if row.tools is None else tuple(row.tools.definitions)
    return GoldenAnswer(prompt, "", MAX_TOKENS, tools=tools)


def _label_margin(runtime: Runtime, name: str, question: GoldenAnswer) -> tuple[bool, float]:
    """Whether there is an answer, and the lead of the most likely label over the second, in nats."""
    second, best = sorted(runtime.classify(question.prompt, adapter=name, exact=True).probabilities.values())[-2:]
    return True, math.log(best / second) if second else math.inf


def _token_margin(runtime: Runtime, name: str, question: GoldenAnswer) -> tuple[bool, float]:
    """Whether the answer has text, and the smallest lead of the best token over the second, in nats.

    Only tokens that the output constraint allows count.
    """
    options = {**options_of(question), "logprobs": 0}
    answer = runtime.generate(question.prompt, adapter=name, **options)
    tokens = [logprob.token for logprob in answer.logprobs or ()]
    _, form, _ = split_options(options, ("raw",))
    call = loaded_bundle(runtime).call(question.prompt, name, form=form, raw=options["raw"])
    has_ended = answer.stop_reason == "end"
    smallest = math.inf
    with call.lease() as context:
        rows = [context.run(call.job).logits]
        # If the answer was cut, the last token was not computed and may not fit.
        computed = tokens if has_ended else tokens[:-1]
        rows += list(context.extend(computed)) if computed else []
    for row, token in zip(rows, [*tokens, None], strict=False):
        smallest = min(smallest, _lead(row, call.constraint))
        if token is not None and call.constraint is not None:
            call.constraint.accept(token)
    return answer.text != "", smallest


def _lead(row: Floats, constraint: Constraint | None) -> float:
    """The lead of the best token over the second in a row of logits; infinite where there is no choice."""
    if constraint is not None and (constraint.is_complete or constraint.forced()):
        return math.inf
    allowed = row if constraint is None else constraint.mask(row)
    if allowed is None:
        return math.inf
    second, best = np.partition(allowed, -2)[-2:]
    return float(best - second)
