"""The options of `generate`, `stream` and `send`, and the output constraint among them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .decoding.output import OutputSpec, output_of
from .errors import UsageError
from .text.sampling import Sampling

_CONSTRAINTS = ("schema", "choices", "regex", "grammar")


class SamplingOptions(TypedDict, total=False):
    """Fields of `Sampling`, set for one answer."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    max_tokens: int


class AnswerOptions(SamplingOptions, total=False):
    """Options of one answer.

    `sampling` says how tokens are chosen; other options, such as `temperature=0.7`, change single fields of it. After
    `deadline_s` seconds, which include waiting for other calls, or once `cancel` is set, the answer ends with the text
    so far.

    At most one of `schema` (a JSON Schema as mapping or text, or a pydantic model class), `choices` (texts), `regex`
    and `grammar` (Lark as llguidance reads it) constrains the answer, instead of the adapter's own constraint; `free`
    removes that.

    With `logprobs`, `Answer.logprobs` has the log-probability of each token, and of that many of the likeliest tokens
    at its place (0 to 20); see `TokenLogprob`.
    """

    sampling: Sampling | None
    deadline_s: float | None
    cancel: threading.Event | None
    logprobs: int | None
    schema: object
    choices: Sequence[str] | None
    regex: str | None
    grammar: str | None
    free: bool


def split_output(options: Mapping[str, Any]) -> tuple[OutputSpec | None, bool, dict[str, Any]]:
    """The output constraint among the options, whether they remove the adapter's own, and the other options.

    Raises what `output_of` does; UsageError for `free` together with a constraint.
    """
    others = {key: value for key, value in options.items() if key not in (*_CONSTRAINTS, "free")}
    given = {key: options[key] for key in _CONSTRAINTS if options.get(key) is not None}
    is_free = bool(options.get("free", False))
    if given and is_free:
        raise UsageError(f"free and {next(iter(given))} are both given", "give one of them")
    return (output_of(**given) if given else None), is_free, others
