"""Chooses the settings of a task from its rows, each with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edgetune_runtime.text.json_text import json_or_none

from edgetune.tasks.augmentation.english import are_english
from edgetune.tasks.augmentation.slots import SlottedRow
from edgetune.tasks.confidence import MIN_ROWS
from edgetune.tasks.data import TaskRow
from edgetune.tasks.metrics import EITHER_RIGHT_OR_WRONG, answers_to_score, form_doubt, label_doubts, metric_for

from .choices import Choice
from .columns import RowForm
from .files import Sample

_MOST_LABELS, _LABEL_WORDS, _LABEL_CHARACTERS = 50, 5, 60
# Rows per distinct answer before the answers are labels: in a column that is called so, and in any other.
_NAMED_REPEATS, _OTHER_REPEATS = 2, 5
# From so many rows on, changed copies are not worth their time; and the least share of rows with values to exchange.
_MANY_ROWS, _SHARE_OF_VALUES = 400, 0.25
# Enough to choose a checkpoint; more only take time.
_MOST_VALIDATION = 2000
_TRAINING = "epochs and rows per step follow from the number of rows: `edgetune plan` shows them"
_AUGMENT = "few rows, so changed copies with other values teach the rest: `edgetune data preview` shows them"
_METRICS = {
    "label": "the share of right labels",
    "json": "the share of answers with the right keys and values",
    "exact": "the share of answers that are word for word the expected one",
    "rouge_l": "the overlap with the expected answer in order, because answers of several words have many wordings",
    "perplexity": "how well the text is predicted, because the rows have no answers",
}


def settings_of(task: str, sample: Sample, form: RowForm, rows: Sequence[TaskRow], *, held_out: bool) -> list[Choice]:
    """The settings of the task whose file starts with these `rows`; `held_out`: without a file for validation."""
    labels = _labels(rows, _NAMED_REPEATS if form.is_label else _OTHER_REPEATS)
    metric = metric_for("auto", rows, labels)
    choices = []
    if held_out:
        answers_per_row = len(answers_to_score(rows, metric)) / len(rows)
        choices.append(_held_out(sample.rows, answers_per_row, has_confidence=metric in EITHER_RIGHT_OR_WRONG))
    if sample.rows < _MANY_ROWS and _has_values(rows):
        choices.append(Choice("data.augment", True, _AUGMENT))
    has_own = all(row.system is not None for row in rows)
    if (system := _system(form, rows)) is not None:
        choices.append(system)
    elif not has_own and metric != "perplexity" and not any(row.tools for row in rows):
        prompt = _prompt(task, form.noun, metric)
        choices.append(
            Choice("system", prompt, "what the task is; a short prompt is faster, and the rows teach the rest")
        )
    if labels:
        choices += _label_choices(labels, sample)
    else:
        # With the metric in the recipe, a build does not say it.
        doubt = form_doubt(rows)
        choices.append(Choice("metric", metric, _METRICS[metric] + (f"; {doubt}" if doubt else "")))
    if not any(row.tools for row in rows) and all(
        _is_json(answer.completion) for row in rows for answer in row.answers
    ):
        choices.append(Choice("output", "auto", "all answers are JSON: only tokens that fit their schema are allowed"))
    return [*choices, Choice("training", "auto", _TRAINING)]


def _labels(rows: Sequence[TaskRow], repeats: int) -> list[str] | None:
    """The labels if the answers are few, short and repeat; None for other answers."""
    answers = Counter(row.completion.strip() for row in rows if row.completion is not None and row.tools is None)
    is_few = 2 <= len(answers) <= _MOST_LABELS and len(rows) >= repeats * len(answers)
    if answers.total() < len(rows) or not is_few or any(map(_is_json, answers)):
        return None
    is_short = all(len(a.split()) <= _LABEL_WORDS and len(a) <= _LABEL_CHARACTERS for a in answers)
    return sorted(answers) if is_short else None


def _label_choices(labels: Sequence[str], sample: Sample) -> list[Choice]:
    reason = f"{len(labels)} short answers repeat in {sample}, so the task is to choose one: {_METRICS['label']}"
    reason = "; ".join(
        (reason, "`out_of_scope: true` adds a label for texts that none of them fits", *label_doubts(labels))
    )
    # Rows behind the sample may have other labels; without the key, the build takes those of all rows.
    listed = [Choice("labels", list(labels))] if sample.is_whole else []
    return [Choice("metric", "label", reason), *listed]


def _held_out(rows: int, answers_per_row: float, *, has_confidence: bool) -> Choice:
    """The share of the rows for validation."""
    share = 0.1 if rows * 0.1 <= _MOST_VALIDATION else round(_MOST_VALIDATION / rows, 5)
    # Too few for a confidence choose nothing, and each row that is trained on gives more right answers.
    if has_confidence and 0.1 * rows * answers_per_row < MIN_ROWS <= 0.2 * rows * answers_per_row:
        share = 0.2
    count = max(1, round(rows * share))
    answers = round(count * answers_per_row)
    counted = "" if answers == count else f" with {answers:,} answers"
    reason = f"about {count:,} of {rows:,} rows{counted} for validation, which shows overfitting"
    if has_confidence and answers >= MIN_ROWS:
        reason += " and gives the confidence of answers"
    elif has_confidence:
        folds = ", or `confidence_folds: 5`, which uses training rows too" * (rows * answers_per_row >= MIN_ROWS)
        reason += f"; a confidence takes {MIN_ROWS}{folds}"
    return Choice("data.held_out", share, reason)


def _has_values(rows: Sequence[TaskRow]) -> bool:
    """Whether the prompts have enough of the values of their answers, which changed copies can exchange."""
    english = are_english(rows)
    slotted = [item for row in rows if (item := SlottedRow.of(row, english=english)) is not None and item.slots]
    changed = [item for item in slotted if not item.answer.has_offsets(item.row.prompt)]
    return len(changed) >= _SHARE_OF_VALUES * len(rows)


def _system(form: RowForm, rows: Sequence[TaskRow]) -> Choice | None:
    """The system prompt that all rows have, or their most frequent one; None if none repeats, or some have none."""
    prompts = Counter(row.system for row in rows)
    if form.system is not None or (len(prompts) == 1 and None not in prompts):
        return Choice("system", form.system or rows[0].system, "the rows have it in common")
    prompt, count = prompts.most_common(1)[0]
    if None in prompts or count == 1:
        return None
    reason = f"for calls without one; the rows have {len(prompts)}, of which this is the most frequent"
    return Choice("system", prompt, f"{reason}: send the right one with each call")


def _prompt(task: str, noun: str, metric: str) -> str:
    name = task.replace("-", " ")
    if metric == "label":
        return f"Name the {noun or name}."
    if noun:
        return f"Give the {noun}{' as JSON' * (metric == 'json')}."
    return f"{name.capitalize()} task.{' Answer in JSON.' * (metric == 'json')}"


def _is_json(text: str | None) -> bool:
    """Whether a text is a JSON object or list."""
    return isinstance(json_or_none(text or ""), dict | list)
