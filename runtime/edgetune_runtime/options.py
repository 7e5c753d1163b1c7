"""What `generate`, `stream` and `send` take beside a prompt, and what that says of an answer's form."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .decoding.output import OutputSpec, output_of
from .errors import UsageError
from .text.sampling import Sampling

_FORM = ("schema", "choices", "regex", "grammar")


class SamplingOptions(TypedDict, total=False):
    """Fields of `Sampling`, to be set for one answer."""

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

    `sampling` is how tokens are chosen; single fields of it, such as `temperature=0.7`, may be given beside it.
    After `deadline_s` seconds, or once `cancel` is set, the answer ends with what there is, waiting for other calls
    included.

    One of `schema` (a JSON Schema as mapping or text, or a pydantic model class), `choices` (texts), `regex` and
    `grammar` (Lark as llguidance reads it) holds the answer to a form, in place of the adapter's own; `free` holds it
    to none.
    """

    sampling: Sampling | None
    deadline_s: float | None
    cancel: threading.Event | None
    schema: object
    choices: Sequence[str] | None
    regex: str | None
    grammar: str | None
    free: bool


def split_form(options: Mapping[str, Any]) -> tuple[OutputSpec | None, bool, dict[str, Any]]:
    """The form that the options give, whether an adapter's own is left out, and the other options.

    Raises what `output_of` does; UsageError for `free` beside a form.
    """
    others = {key: value for key, value in options.items() if key not in (*_FORM, "free")}
    given = {key: options[key] for key in _FORM if options.get(key) is not None}
    is_free = bool(options.get("free", False))
    if given and is_free:
        raise UsageError(f"free and {next(iter(given))} are both given", "give one of them")
    return (output_of(**given) if given else None), is_free, others
