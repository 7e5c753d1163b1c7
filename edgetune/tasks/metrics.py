"""Metrics that score answers against references, between 0 and 1."""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence

from edgetune_runtime.errors import UsageError
from edgetune_runtime.text.json_text import json_or_none

from edgetune.recipe.parts import Metric

from .data import TaskRow
from .plain_prompts import plain_prompt

LONG_ANSWER_WORDS = 3
_UNSPACED = "".join(
    (
        "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",  # Han
        "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f",  # Kana
        "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46",  # Thai
    )
)
"""Ranges of the letters of scripts without spaces between words: each letter counts as a word."""
EITHER_RIGHT_OR_WRONG: tuple[Metric, ...] = ("exact", "json", "label")
"""The metrics that score each answer 0 or 1."""


def metric_for(metric: Metric, rows: Sequence[TaskRow], labels: Sequence[str] | None) -> Metric:
    """The metric to use: `metric` itself, or for "auto" the one that suits `rows`.

    Label accuracy if there are labels, or if the rows have a label that occurs again; perplexity for rows of text; JSON
    equality if all completions are JSON objects or lists, but for texts of rows with tools, of which at least half end
    in calls; ROUGE-L for completions of more than three words on average, or characters of scripts without spaces;
    otherwise exact match.
    """
    if metric != "auto":
        return metric
    if labels or _are_labelled(rows):
        return "label"
    completions = [row.completion for row in rows if row.completion is not None]
    if not completions:
        return "perplexity"
    has_json = [_is_json(row) for row in rows]
    are_json = all(is_json or row.tools is not None for is_json, row in zip(has_json, rows, strict=True))
    if are_json and sum(has_json) * 2 >= len(rows):
        return "json"
    words = sum(map(_words_in, completions)) / len(completions)
    return "rouge_l" if words > LONG_ANSWER_WORDS else "exact"


def compared_answers(row: TaskRow, metric: Metric) -> list[TaskRow]:
    """The answers of a row that the metric compares, each as a row; maybe none with "json".

    These are calls, objects and lists, and where tools are offered other texts than those after a tool's result: there
    any text is right, elsewhere an answer without a call. With "label" only the last answer is compared.
    """
    if metric == "label":
        return [row]
    answers = row.answers
    if metric != "json":
        return answers
    compared = [each for each in answers if _is_json(each) or (each.tools is not None and not _is_after_result(each))]
    return compared or ([] if _is_after_result(row) else [row])


def asked(row: TaskRow, metric: Metric) -> TaskRow:
    """The last answer of a row that the metric compares, or the row; no row for training may have its prompt."""
    return next(reversed(compared_answers(row, metric)), row)


def answers_to_score(rows: Sequence[TaskRow], metric: Metric, learned: Collection[str] = ()) -> list[TaskRow]:
    """The answers of the rows that the metric compares, each as a row.

    Before the last of a conversation, the first answer to the same plain prompt counts, and none to `learned` ones.
    """
    compared = [answers for row in rows if (answers := compared_answers(row, metric))]
    seen = {*learned, *(plain_prompt(answers[-1]) for answers in compared)}
    scored: list[TaskRow] = []
    for *earlier, last in compared:
        for answer in earlier:
            if (prompt := plain_prompt(answer)) not in seen:
                seen.add(prompt)
                scored.append(answer)
        scored.append(last)
    return scored


def is_scorable(row: TaskRow, metric: Metric) -> bool:
    """Whether the metric can compare an answer with that of the row: it has one, with "json" one that may be wrong."""
    if metric == "perplexity":
        return True
    if row.completion is None:
        return False
    if metric != "json":
        return True
    if row.tools is not None:
        return bool(compared_answers(row, metric))
    return not isinstance(_parsed(row.completion), ValueError)


def checked_answers(rows: Sequence[TaskRow], metric: Metric) -> list[TaskRow]:
    """`answers_to_score` of these rows; UsageError where the metric can compare none of them, or not one of them."""
    answers = answers_to_score(rows, metric)
    if rows and not answers:
        reason = f"none of {len(rows)} rows, such as {rows[0].where}, can be scored by {metric}"
        raise UsageError(f"{reason}: any text is right after a tool's result", "give others, or choose another metric")
    check_scorable(answers, metric)
    return answers


def check_scorable(rows: Sequence[TaskRow], metric: Metric) -> None:
    """UsageError for a row with whose answer the metric can compare none, and without rows."""
    if not rows:
        raise UsageError("there are no rows to score", "give at least one")
    check_answered(rows, metric)
    for row in rows:
        if not is_scorable(row, metric):
            message = f"{row.where}: the answer {(row.completion or '')[:60]!r} is not JSON, but the metric is {metric}"
            raise UsageError(message, "correct it, or choose another metric, such as exact")


def check_answered(rows: Sequence[TaskRow], metric: str) -> None:
    """UsageError for a row of plain text, unless the metric is perplexity: all others compare answers."""
    texts = [row.where for row in rows if row.completion is None]
    if texts and metric != "perplexity":
        message = f"{texts[0]}: is plain text, but metric {metric} compares answers"
        forms = "text and label" if metric == "label" else "prompt and completion, or of messages"
        raise UsageError(message, f"use rows of {forms}")


def per_conversation(points: Iterable[tuple[str, float]]) -> list[float]:
    """The mean of the points of each conversation, as its answers are not independent; each with its conversation."""
    conversations: dict[str, list[float]] = {}
    for conversation, value in points:
        conversations.setdefault(conversation, []).append(value)
    return [*map(statistics.fmean, conversations.values())]


def labels_in(rows: Sequence[TaskRow]) -> tuple[str, ...]:
    """The labels of the rows, in alphabetical order."""
    return tuple(sorted({row.completion for row in rows if row.completion is not None}))


def same_but_for_form(labels: Iterable[str]) -> list[list[str]]:
    """The labels that differ in case or Unicode form alone, those of each word together."""
    by_word: dict[str, list[str]] = {}
    for label in labels:
        by_word.setdefault(unicodedata.normalize("NFC", label).casefold(), []).append(label)
    return [same for same in by_word.values() if len(same) > 1]


def is_list(label: str) -> bool:
    """Whether a label was written as a list, such as `["hall", "on"]`."""
    return label.startswith("[") and isinstance(json_or_none(label), list)


def label_doubts(labels: Iterable[str]) -> tuple[str, ...]:
    """A sentence about each of the `same_but_for_form` labels, and one about those that are lists."""
    labels = tuple(labels)
    lists = [label for label in labels if is_list(label)]
    doubts = (
        f"the labels {' and '.join(map(repr, same))} differ only in case or Unicode form, "
        "so a right answer may count as wrong"
        for same in same_but_for_form(labels)
    )
    combined = [f"labels are lists, such as {lists[0]}: each combination is one label"] if lists else []
    return (*doubts, *combined)


def without_label(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows that keep the others, at least half of all, from having labels."""
    labelled = [row for row in rows if row.is_labelled]
    is_usual = 2 * len(labelled) >= len(rows) and _are_labelled(labelled)
    return [row for row in rows if not row.is_labelled] if is_usual else []


def without_json(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows that keep the others, at least nine of ten, from being scored as JSON."""
    odd, others = list[TaskRow](), list[TaskRow]()
    for row in rows:
        is_json = row.tools is not None or _is_json(row)
        (others if is_json else odd).append(row)
    return odd if 0 < 10 * len(odd) <= len(rows) and metric_for("auto", others, None) == "json" else []


def form_doubt(rows: Sequence[TaskRow]) -> str | None:
    """A sentence about the rows that keep the others from having labels or JSON; None without any."""
    for odd, what, form in (
        (without_label(rows), "rows have no label", "labels"),
        (without_json(rows), "answers are not JSON objects or lists", "JSON"),
    ):
        if odd:
            share = f"{len(odd)} of {len(rows)} {what}, such as {odd[0].where}"
            return f"{share}, so the answers are free text, not {form}"
    return None


def _is_json(row: TaskRow) -> bool:
    """Whether the answer is an object, a list or calls."""
    return isinstance(_parsed(row.completion or ""), dict | list)


def _is_after_result(row: TaskRow) -> bool:
    """Whether the answer says what a tool's result means."""
    return row.messages is not None and row.messages[-1]["role"] == "tool"


def _are_labelled(rows: Sequence[TaskRow]) -> bool:
    return all(row.is_labelled for row in rows) and len(labels_in(rows)) < len(rows)


def score(
    metric: Metric, predictions: Sequence[str], references: Sequence[str], *, offers_tools: Sequence[bool] = ()
) -> tuple[float, list[float]]:
    """The mean score and the score of each row, between 0 and 1; compares `predictions[i]` with `references[i]`.

    "exact" and "label" ignore surrounding white space; "json" compares parsed values, so the order of keys does not
    matter, and scores invalid JSON 0; both compare texts in Unicode's form NFC. With "json", a text is right where a
    text is expected and `offers_tools[i]`: nothing was to be called. "rouge_l" is the F-measure of ROUGE-L (Lin 2004)
    from the rouge-score library, of words, and of characters in scripts without spaces (Han, Kana and Thai); "chrf" is
    chrF (Popović 2015) of each row from sacrebleu. All compare calls by their names and arguments, and score a call in
    place of a text 0. Raises UsageError for other metrics, without rows, and if the numbers of predictions and
    references differ.
    """
    if len(predictions) != len(references) or not references:
        message = f"cannot score {len(predictions)} predictions against {len(references)} references"
        raise UsageError(message, "pass one prediction per reference, and at least one")
    compare = _comparison(metric)

    def points(prediction: str, reference: str, offers: bool) -> float:
        calls, expected = _calls(prediction), _calls(reference)
        if calls is not None or expected is not None:
            return float(_same(calls, expected))
        if metric == "json" and offers and isinstance(_parsed(reference), ValueError):
            return 1.0
        return compare(prediction, reference)

    rows = [*map(points, predictions, references, offers_tools or [False] * len(references))]
    return sum(rows) / len(rows), rows


def _comparison(metric: str) -> Callable[[str, str], float]:
    if metric in ("exact", "label"):
        return _exact_match
    if metric == "json":
        return _json_equality
    if metric == "rouge_l":
        return _rouge_l()
    if metric == "chrf":
        return _chrf()
    raise UsageError(f"the metric {metric!r} does not compare answers", "use exact, json, label, rouge_l or chrf")


def _exact_match(prediction: str, reference: str) -> float:
    return float(_same(prediction.strip(), reference.strip()))


def _json_equality(prediction: str, reference: str) -> float:
    expected = _parsed(reference)
    if isinstance(expected, ValueError):
        raise UsageError(f"the reference {reference[:60]!r} is not JSON", "choose another metric, such as exact")
    return float(_same(_parsed(prediction), expected))


def _calls(answer: str) -> object:
    """The calls of an answer as `answer_text` writes them; None if it has none."""
    value = _parsed(answer) if "tool_calls" in answer else None
    return value.get("tool_calls") if isinstance(value, dict) else None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _same(one: object, other: object) -> bool:
    # True == 1 in Python, but not in JSON.
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) and isinstance(other, str):
        return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    if isinstance(one, dict) and isinstance(other, dict):
        left, right = ({unicodedata.normalize("NFC", key): each[key] for key in each} for each in (one, other))
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _words_in(text: str) -> int:
    """The number of words between white space; one with letters of `_UNSPACED` counts as so many."""
    return len(re.findall(rf"[{_UNSPACED}]|(?<!\S)[^\s{_UNSPACED}]++(?!\S)", text))


class _Words:
    """Tokenizer for words of any script: rouge-score's own drops everything except a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return _word_pattern().findall(unicodedata.normalize("NFC", text.lower()))


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    r"""A letter of `_UNSPACED` or a word of others, with their combining marks, which \w leaves out."""
    marks = "".join(sign for sign in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(sign) in ("Mn", "Mc"))
    return re.compile(rf"[{_UNSPACED}][{marks}]*|(?:[^\W{_UNSPACED}][{marks}]*)+")


def _rouge_l() -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - slow to import

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())

    def compare(prediction: str, reference: str) -> float:
        # An emoji is no word.
        if prediction.strip() == reference.strip():
            return 1.0
        return float(scorer.score(reference, prediction)["rougeL"].fmeasure)

    return compare


def _chrf() -> Callable[[str, str], float]:
    import sacrebleu  # noqa: PLC0415 - slow to import

    def compare(prediction: str, reference: str) -> float:
        # Its chrF of two empty texts is 0.
        if prediction.strip() == reference.strip():
            return 1.0
        return float(sacrebleu.sentence_chrf(prediction, [reference]).score) / 100

    return compare
