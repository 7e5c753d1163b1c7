"""Scores an adapter of a bundle on data: the runtime answers the rows, as on the device."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from edgetune_runtime import Answer, Classification, Runtime
from edgetune_runtime.bundle import MARK, AdapterEntry, Manifest
from edgetune_runtime.engines.base import LabelEngine
from edgetune_runtime.errors import UsageError, VerificationError
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.tools.calls import answer_text
from pydantic import ValidationError

from edgetune.common.progress import Progress, Step
from edgetune.common.spread import spread
from edgetune.objectives.example import Example
from edgetune.recipe.data import Columns
from edgetune.recipe.parts import Metric
from edgetune.recipe.rows import Rows

from . import metrics
from .data import TaskRow, labelled_text, read_rows
from .splitting import conversations
from .tokenization import tokenize_rows

Pair = tuple[TaskRow, Example | None]
"""A row with its tokens; None for a row of plain text."""


@dataclass(frozen=True)
class ScoredRow:
    """One row: prompt, expected answer, actual answer, and score between 0 and 1.

    With perplexity there is no answer, and `score` is the negative log likelihood in nats per token; `bits_per_byte`
    says the same without regard to the tokenizer, and is None for other metrics. `written` is the answer with its calls
    as the model wrote them. `kind`, `log_odds` and `confidence` are those of `edgetune_runtime.Answer`. Answers of one
    `conversation` are not independent.
    """

    where: str
    prompt: str
    reference: str
    answer: str
    score: float
    kind: str | None = None
    log_odds: float | None = None
    confidence: float | None = None
    bits_per_byte: float | None = None
    written: str = ""
    conversation: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The score of an adapter on `rows` rows, without `too_long` more that do not fit in the bundle's context.

    `score` is between 0 and 1, higher is better; perplexity is at least 1, and lower is better.
    """

    score: float
    metric: str
    rows: int
    too_long: int
    details: tuple[ScoredRow, ...]

    def to_json(self) -> dict[str, Any]:
        """`score`, `metric`, `rows` and `too_long` as JSON values."""
        return {"score": self.score, "metric": self.metric, "rows": self.rows, "too_long": self.too_long}


@dataclass(frozen=True)
class _Task:
    """The runtime, adapter, system prompt, labels and metric for scoring rows."""

    runtime: Runtime
    adapter: str | None
    system: str | None
    labels: tuple[str, ...]
    metric: Metric


def evaluate(
    bundle: Path,
    adapter: str | None,
    data: str | Path | Rows,
    *,
    limit: int | None = None,
    engine: str | None = None,
    kv: str | None = None,
    progress: Progress,
) -> Evaluation:
    """Score `adapter` (None: the plain base) on the rows of `data`, which may be a file or a hub id, with its metric.

    The columns are those from the adapter's training; a file with prompt and completion, or text and label, works too.
    At most `limit` rows are scored, spread evenly over the file, which may be sorted. Answers are greedy. With labels,
    the answer is what `classify` chooses among the adapter's labels, or for the base among those of all rows. `kv` is
    the type of the KV cache (see `Runtime.open`).

    Raises what `Runtime.open` and `read_rows` raise, and UsageError for rows that the metric cannot score.
    """
    with Runtime.open(bundle, engine=engine, kv=kv, disk_mb=0) as runtime:
        rows, metric = rows_for(runtime.manifest, adapter, data)
        return score(runtime, adapter, rows, progress, metric, limit=limit)


def score(
    runtime: Runtime,
    adapter: str | None,
    rows: Sequence[TaskRow],
    progress: Progress,
    metric: Metric | None = None,
    *,
    limit: int | None = None,
) -> Evaluation:
    """Score `adapter` (None: the plain base) of an open runtime on `rows`, like `evaluate`.

    `metric` is by default the adapter's, or for the base the one that suits the rows.
    """
    entry = runtime.manifest.adapter(adapter) if adapter is not None else None
    labels = entry.labels if entry is not None else ()
    metric = metrics.metric_for(metric or _metric(entry), rows, labels)
    if metric == "label" and not labels:
        labels = metrics.labels_in(rows)
    rows = spread(rows, limit)
    system = entry.system if entry is not None else None
    task = _Task(runtime, adapter, system, labels, metric)
    metrics.check_scorable(rows, metric)
    fitting, context = _fitting(task, rows), runtime.context_length
    if not fitting:
        message = f"none of {len(rows)} rows fits in the context of {context} tokens"
        raise UsageError(message, "build the bundle with a larger context_length or shorten the rows")
    too_long = len(rows) - len(fitting)
    if too_long:
        progress.say(f"leaving out {too_long} of {len(rows)} rows, which do not fit in the context of {context} tokens")
    run = _perplexity if metric == "perplexity" else _answers
    with progress.step(f"evaluating {adapter or 'the base'}", len(fitting)) as step:
        points, details = run(task, fitting, step)
    places = conversations([row for row, _ in fitting])
    details = [replace(row, conversation=place) for row, place in zip(details, places, strict=True)]
    return Evaluation(points, metric, len(fitting), too_long, tuple(details))


def rows_that_fit(runtime: Runtime, adapter: str, rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows that fit in the context with their answers, which are those that can be learned and scored."""
    entry = runtime.manifest.adapter(adapter)
    return [row for row, _ in _fitting(_Task(runtime, adapter, entry.system, entry.labels, _metric(entry)), rows)]


def most_tokens(reference: int) -> int:
    """How long an answer may be to a row with one of `reference` tokens: a worse model writes more."""
    return int(reference * 1.5) + 16


def _perplexity(task: _Task, pairs: Sequence[Pair], step: Step) -> tuple[float, list[ScoredRow]]:
    details, total_nats, total_tokens = [], 0.0, 0
    for row, example in pairs:
        nats, tokens = _loss(task, row, example)
        size = len((row.completion or row.text or "").encode()) or 1
        details.append(_detail(row, "", nats / tokens, bits_per_byte=nats / math.log(2) / size))
        total_nats += nats
        total_tokens += tokens
        step.update()
    return math.exp(total_nats / total_tokens), details


def _answers(task: _Task, pairs: Sequence[Pair], step: Step) -> tuple[float, list[ScoredRow]]:
    longest = max(len(example.tokens) - example.prompt_length for _, example in pairs if example is not None)
    details = []
    with ThreadPoolExecutor(task.runtime.contexts) as threads:
        # Answers are the same side by side.
        for detail in threads.map(lambda pair: _answer(task, pair[0], most_tokens(longest)), pairs):
            details.append(detail)
            step.update()
    answers, references = [row.answer for row in details], [row.reference for row in details]
    offers_tools = [row.tools is not None for row, _ in pairs]
    score, scores = metrics.score(task.metric, answers, references, offers_tools=offers_tools)
    return score, [replace(row, score=points) for row, points in zip(details, scores, strict=True)]


def _answer(task: _Task, row: TaskRow, max_tokens: int) -> ScoredRow:
    """The most likely label, or a greedy answer; not scored yet."""
    prompt = row.messages or ()
    reply: Classification | Answer
    if task.metric == "label":
        reply = task.runtime.classify(prompt, task.labels or None, adapter=task.adapter)
        text = written = reply.label
    else:
        tools = None if row.tools is None else row.tools.definitions
        options: dict[str, Any] = {"tools": tools, "temperature": 0.0, "max_tokens": max_tokens, "unsure": MARK}
        reply = task.runtime.generate(prompt, adapter=task.adapter, **options)
        text, written = text_to_score(reply), reply.text
    sureness = {"kind": reply.kind, "log_odds": reply.log_odds, "confidence": reply.confidence}
    return _detail(row, text, 0.0, written=written, **sureness)


def text_to_score(reply: Answer) -> str:
    """An answer as `answer_text` writes it; a call that cannot be read is one too, so that it never counts as none."""
    if reply.text.strip() != reply.content.strip() and (reply.is_cut_off or not reply.tool_calls):
        return json.dumps({"tool_calls": [reply.text]}, ensure_ascii=False)
    return answer_text(reply.content, [(call.name, call.arguments) for call in reply.tool_calls])


def _loss(task: _Task, row: TaskRow, example: Example | None) -> tuple[float, int]:
    """Negative log likelihood (nats) of a text, or of a completion after its prompt, and its number of tokens."""
    if example is None:
        return task.runtime.negative_log_likelihood(row.text or "", adapter=task.adapter)
    context, active = loaded_bundle(task.runtime).context(task.adapter)
    target = example.tokens[example.prompt_length :]
    with context.hold():
        context.start(active, example.prompt_tokens)
        return -context.engine.score([target])[0], len(target)


def _detail(row: TaskRow, answer: str, score: float, **more: Any) -> ScoredRow:  # noqa: ANN401 - as ScoredRow
    return ScoredRow(row.where, row.prompt, row.completion or "", answer, score, **more)


def rows_for(manifest: Manifest, adapter: str | None, data: str | Path | Rows) -> tuple[list[TaskRow], Metric]:
    """The rows of `data` for an adapter (None: the base), and their metric: with the columns from its training, or if
    that fails, by their keys, if these give prompt rows. Conversations have a row for each answer.

    Raises what `read_rows` raises, and UsageError for rows that the adapter's metric cannot score.
    """
    entry = manifest.adapter(adapter) if adapter is not None else None
    source, columns = str(data) if isinstance(data, Path) else data, _columns(manifest, adapter)
    labels = entry.labels if entry is not None and entry.metric == "label" and entry.labels else None
    rows = _read(source, columns, labels)
    metric = metrics.metric_for(_metric(entry), rows, labels)
    return metrics.checked_answers(rows, metric), metric


def _read(source: str | Rows, columns: Columns | None, labels: Sequence[str] | None) -> list[TaskRow]:
    try:
        return read_rows(source, columns, labels=labels)
    except UsageError:
        if columns is None:
            raise
        try:
            rows = read_rows(source, labels=labels)
        except UsageError:
            rows = []
        # Rows read as plain text would hide an error in the columns.
        if not rows or any(row.completion is None for row in rows):
            raise
        return rows


def _columns(manifest: Manifest, adapter: str | None) -> Columns | None:
    """The columns of the adapter's data in the bundle's recipe; None if it sets none."""
    node: Any = manifest.recipe
    for key in ("adapters", adapter, "data", "columns"):
        node = node.get(key) if isinstance(node, dict) else None
    try:
        return None if node is None else Columns.model_validate(node)
    except ValidationError as error:
        message = f"the recipe in bundle {manifest.name!r} has invalid columns: {node}"
        raise VerificationError(message, "build the bundle again") from error


def _metric(entry: AdapterEntry | None) -> Metric:
    if entry is None:
        return "auto"
    if entry.metric not in get_args(Metric):
        message = f"adapter {entry.name!r} has unknown metric {entry.metric!r}"
        raise VerificationError(message, f"build the bundle again with one of: {', '.join(get_args(Metric))}")
    return cast("Metric", entry.metric)


def _fitting(task: _Task, rows: Sequence[TaskRow]) -> list[Pair]:
    """The rows that fit in the context, prompt rows with their tokens; texts always fit."""
    loaded = loaded_bundle(task.runtime)
    if loaded.classifier is not None:
        return _fitting_texts(loaded.classifier.engine, rows)
    context, active = loaded.context(task.adapter)
    prompts = [row for row in rows if row.messages is not None]
    with context.hold():
        tokenizer, capacity = context.engine.tokenizer, context.engine.capacity(active)
        examples, _ = tokenize_rows(prompts, tokenizer, system=task.system, loss_on="all", max_tokens=sys.maxsize)
        for row in rows:
            if row.messages is None and len(tokenizer.tokenize(row.text or "")) < 2:
                raise UsageError(f"{row.where}: has 1 token, so there is nothing to predict", "remove the row")
        longest = max((len(tokenizer.tokenize(label, continues=True)) + 1 for label in task.labels), default=0)
    by_row = dict(zip(map(id, prompts), examples, strict=True))
    pairs = [(row, by_row.get(id(row))) for row in rows]
    return [(row, example) for row, example in pairs if example is None or _length(example, longest) <= capacity]


def _fitting_texts(engine: LabelEngine, rows: Sequence[TaskRow]) -> list[Pair]:
    """Like `_fitting`, for an engine that needs no room for an answer."""
    texts = [tuple(engine.tokenizer.tokenize(labelled_text(row))) for row in rows]
    return [
        (row, Example(tokens, (False,) * len(tokens), len(tokens)))
        for row, tokens in zip(rows, texts, strict=True)
        if len(tokens) <= engine.context_length
    ]


def _length(example: Example, longest_label: int) -> int:
    return max(len(example.tokens), example.prompt_length + longest_label)
