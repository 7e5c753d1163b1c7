"""The route that takes corrections of logged answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .answering import Answering, answer_id
from .connection import BodyReader
from .fields import Fields
from .problems import RequestError, json_response

PATH = "/edgetune/corrections"


def routes(answering: Answering, bodies: BodyReader) -> list[Route]:
    """The route, which is there even if answers are not logged, to say so."""

    async def correct(request: Request) -> Response:
        name, correction = await bodies.read(request, _correction)
        if answering.log is None:
            raise RequestError("this server logs no answers", "start it with --log-answers FILE", status=404)
        await asyncio.to_thread(partial(answering.log.corrected, name, correction))
        return json_response({"status": "ok"})

    return [Route(PATH, correct, methods=["POST"])]


def _correction(body: Mapping[str, Any]) -> tuple[str, str | None]:
    """The name of an answer in the log, and what it should have been; None: it is right.

    The body has the `id` of a reply, the `index` of an answer in it, and the `correction`, null for a right answer.
    """
    fields = Fields(body)
    for name in body.keys() - {"id", "index", "correction"}:
        # A misspelled correction would say that the answer is right.
        raise RequestError(f"{name} is no member of a correction", "give id, index and correction", param=name)
    # OpenAI's ids have the kind of the reply before them.
    name = fields.needed_text("id").rpartition("-")[2].rpartition("_")[2]
    text = fields.text("correction")
    if text is not None and not text.strip():
        fields.refuse("correction", "a text that is not empty, or null if the answer is right")
    return answer_id(name, fields.integer("index") or 0), text
