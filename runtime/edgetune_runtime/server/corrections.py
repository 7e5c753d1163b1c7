"""The route that takes corrections of logged answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .answering import Answering, answer_id
from .connection import BodyReader
from .fields import Fields
from .openai_answers import LABEL_PREFIX, ChatShape, CompletionShape
from .problems import RequestError, json_response
from .responses_answers import MESSAGE_PREFIX, RESPONSE_PREFIX

PATH = "/edgetune/corrections"
_PREFIXES = (ChatShape.prefix, CompletionShape.prefix, RESPONSE_PREFIX, MESSAGE_PREFIX, LABEL_PREFIX)
_MEMBERS = ("id", "index", "correction", "is_wrong")


def routes(answering: Answering, bodies: BodyReader) -> list[Route]:
    """The route, which is there even if answers are not logged, to say so."""

    async def correct(request: Request) -> Response:
        name, is_wrong, correction = await bodies.read(request, _correction)
        if answering.log is None:
            raise RequestError("this server logs no answers", "start it with --log-answers FILE", status=404)
        log = answering.log
        judge = partial(log.wrong, name) if is_wrong else partial(log.corrected, name, correction)
        await answering.log_threads.call(judge)
        return json_response({"status": "ok"})

    return [Route(PATH, correct, methods=["POST"])]


def _correction(body: Mapping[str, Any]) -> tuple[str, bool, str | dict[str, Any] | list[Any] | None]:
    """The name of an answer in the log, whether no more is known than that it is wrong, and else what is right.

    The body has the `id` of a reply and the `index` of an answer in it, or the `id` of an answer in the log; and
    `is_wrong`, or the `correction`, a text, an object or a list, which is null for a right answer.
    """
    fields = Fields(body)
    for name in body.keys() - {*_MEMBERS}:
        # A misspelled correction would say that the answer is right.
        raise RequestError(f"{name} is not a member of a correction", f"give {', '.join(_MEMBERS)}", param=name)
    name = fields.needed_text("id")
    name = name.removeprefix(next(filter(name.startswith, _PREFIXES), ""))
    right = body.get("correction")
    if not (right is None or isinstance(right, dict | list) or (isinstance(right, str) and right.strip())):
        fields.refuse("correction", "a text that is not empty, an object or a list, or null if the answer is right")
    is_wrong = fields.flag("is_wrong")
    if is_wrong and right is not None:
        raise RequestError("is_wrong is true beside a correction", "leave one of them out", param="is_wrong")
    return answer_id(name, fields.integer("index") or 0), is_wrong, right
