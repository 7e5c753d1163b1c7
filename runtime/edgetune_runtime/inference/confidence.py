"""The confidence of an answer: the probability that it is right, from the model's log odds for it and its kind.

The log odds come from the leads of the chosen tokens over the best other ones, which costs two maxima per token.
The build fits a curve per kind of answer that turns them into a probability (`edgetune/shipping/confidence.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from edgetune_runtime.bundle import ConfidenceCurve
from edgetune_runtime.decoding.output import OutputSpec
from edgetune_runtime.engines.base import Logits
from edgetune_runtime.text.json_text import leaves

VALUE, CHOICE, LABEL, NOTHING, QUESTION = "value", "choice", "label", "nothing", "question"
"""The kinds of answers: data or text, one of the given texts, an adapter's label, nothing to do, a question.
"""
MAX_LOG_ODDS = 30.0
# With the question marks of Chinese, Japanese and Arabic. What a bracket of JSON follows may be within a text.
_QUESTION = re.compile(r"[?\uff1f\u061f][^\w\]}?\uff1f\u061f]*$")

Curves = Mapping[str, ConfidenceCurve]
"""A curve per kind of answer."""


def log_chance(row: Logits, token: int) -> float:
    """The log-probability of a token against the best other one, from the logits at its place.

    Below log(0.5) where the output constraint, or a draw, overruled the likeliest token.
    """
    others = max(row[:token].max(initial=-np.inf), row[token + 1 :].max(initial=-np.inf))
    lead = float(row[token]) - float(others)
    return min(lead, 0.0) - math.log1p(math.exp(-abs(lead)))


def log_odds(log_chances: Iterable[float | None]) -> float:
    """The log odds of a choice, from the mean log-probability of all choices; None is a token without a choice.

    The mean orders right and wrong answers better than the sum, which long answers lower.
    """
    choices = [chance for chance in log_chances if chance is not None]
    log_probability = min(0.0, sum(choices) / max(len(choices), 1))
    rest = -math.expm1(log_probability)
    return MAX_LOG_ODDS if rest == 0 else _bounded(log_probability - math.log(rest))


def kind_of(text: str, output: OutputSpec | None, *, calls: int, expects_calls: bool) -> str:
    """The kind of a whole answer.

    It is NOTHING for JSON without values, for empty text, and for no call where one was expected.
    """
    if calls:
        return VALUE
    text = text.strip()
    if output is not None and output.kind == "choices":
        return CHOICE
    if _is_empty(text):
        return NOTHING
    if _QUESTION.search(text):
        return QUESTION
    return NOTHING if expects_calls else VALUE


def confidence(curves: Curves, kind: str, log_odds: float) -> float | None:
    """The probability that an answer is right; None where the kind has no curve, as the build had too few such rows."""
    curve = curves.get(kind)
    if curve is None or curve.slope is None:
        return None
    right = curve.rows * curve.right
    # Platt's target of right answers: a curve of few rows rises beyond what they show, above all if none was wrong.
    most = (right + 1) / (right + 2)
    return min(most, 1 / (1 + math.exp(-_bounded(curve.slope * log_odds + curve.offset))))


def _bounded(log_odds: float) -> float:
    return max(-MAX_LOG_ODDS, min(MAX_LOG_ODDS, log_odds))


def _is_empty(text: str) -> bool:
    try:
        return text == "" or all(leaf is None or leaf == "" for leaf in leaves(json.loads(text)))
    except (ValueError, RecursionError):
        return False
