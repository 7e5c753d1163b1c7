"""Asks a model behind an address that speaks OpenAI's chat API, at a limited rate, and again after failures."""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.inference.chat_client import (
    OF_ONE_REQUEST,
    check_address,
    checked_key,
    choice_of,
    format_of,
    post,
    reason_of,
    refused_key,
    without,
    without_key,
)
from edgetune_runtime.wording import shortened

_TRIES, _LONGEST_WAIT_S, _TIMEOUT_S = 5, 60.0, 120.0
_AGAIN = frozenset((408, 429, 500, 502, 503, 504))
"""Statuses after which the same request may succeed later."""


class TeacherError(EdgetuneError):
    """The teacher is not reached, refuses a request, or answers something unusable."""

    exit_code = 8


class RefusedRequestError(TeacherError):
    """The teacher answered others, but refuses this request."""


class RequestsSentError(TeacherError):
    """All requests that the teacher may be sent are sent."""


class Reply(NamedTuple):
    """The text of an answer, and whether it was cut off at the limit of tokens."""

    text: str
    is_cut_off: bool


@dataclass
class Teacher:
    """The model `model` at `url`, such as https://api.example.com/v1.

    At most `per_minute` requests are sent in a minute, and `most_requests` in all; `sent` counts them. An answer has at
    most `max_tokens`, with those that a model thinks before. `say` gets a sentence about each try without an answer.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    per_minute: float = 60.0
    most_requests: int = 1000
    max_tokens: int = 2000
    say: Callable[[str], object] = field(default=lambda _: None, repr=False)
    sent: int = 0
    _refused: set[str] = field(default_factory=set)
    _has_answered: bool = False
    _free_at: float = 0.0

    def __post_init__(self) -> None:
        check_address(self.url)
        self.key = checked_key(self.key)

    def request(
        self, messages: Sequence[Mapping[str, str]], *, temperature: float, seed: int, schema: object = None
    ) -> dict[str, Any]:
        """The body of a request; with `schema`, for an answer in JSON that fits it."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        body |= {"temperature": temperature, "seed": seed, "max_tokens": self.max_tokens}
        if schema is not None:
            body["response_format"] = format_of(schema)
        return without(body, self._refused)

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The answer to a request, tried again while the teacher is busy or not reached.

        A teacher that refuses the temperature, the seed or the name of the limit of tokens gets none from then on, or
        the other name.

        Raises TeacherError after some tries, RequestsSentError when all requests are sent, and for a refusal
        RefusedRequestError if others may be answered.
        """
        problem, remedy = "", "start it"
        for attempt in range(_TRIES):
            if self.sent >= self.most_requests:
                raise RequestsSentError(f"{self.sent} requests are sent", "allow more with --requests")
            self._wait()
            self.sent += 1
            try:
                return self._sent(body)
            except urllib.error.HTTPError as error:
                problem = reason_of(error)
                if error.code == HTTPStatus.TOO_MANY_REQUESTS:
                    remedy = f"lower --per-minute (now {self.per_minute:g}), or wait until it answers again"
                if (refused := refused_key(body, error, problem)) is not None:
                    self._refused.add(refused)
                    body = without(body, {refused})
                    continue
                if error.code not in _AGAIN:
                    remedy = "check --teacher, --model and the key"
                    is_of_one = self._has_answered and error.code in OF_ONE_REQUEST
                    kind = RefusedRequestError if is_of_one else TeacherError
                    raise kind(f"the teacher at {self.url} refuses: {problem}", remedy) from error
                wait_s = _seconds(error.headers.get("Retry-After"), 2.0**attempt)
            except ValueError as error:
                if not self._has_answered:
                    remedy = "give the address of OpenAI's chat API, which often ends with /v1, and one of its models"
                    raise TeacherError(f"the teacher at {self.url} answers {str(error)!r}", remedy) from error
                problem, wait_s = f"it answers {str(error)!r}", 2.0**attempt
            except (OSError, http.client.HTTPException) as error:
                problem, wait_s = str(error) or type(error).__name__, 2.0**attempt
            self._free_at = time.monotonic() + min(wait_s, _LONGEST_WAIT_S)
            self.say(f"the teacher does not answer: {shortened(problem)} (try {attempt + 1} of {_TRIES})")
        message = f"the teacher at {self.url} does not answer after {_TRIES} tries: {shortened(problem)}"
        raise TeacherError(message, f"{remedy}, and run the same command again to go on")

    def _wait(self) -> None:
        now = time.monotonic()
        if now < self._free_at:
            time.sleep(self._free_at - now)
        self._free_at = max(now, self._free_at) + 60 / self.per_minute

    def _sent(self, body: Mapping[str, Any]) -> Reply:
        """The answer to a request; ValueError with what came in place of one, and the errors of `post`."""
        raw = post(self.url, body, key=self.key, timeout_s=_TIMEOUT_S)
        try:
            choice = choice_of(raw)
        except ValueError as error:
            raise ValueError(shortened(without_key(raw.decode(errors="replace"), self.key), 80)) from error
        self._has_answered = True
        return Reply(choice["message"].get("content") or "", choice.get("finish_reason") == "length")


def _seconds(text: str | None, default: float) -> float:
    try:
        return float(text or "")
    except ValueError:
        return default
