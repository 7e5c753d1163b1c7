"""Writes answers as the JSON and the events of OpenAI's /v1/responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, ClassVar

from edgetune_runtime.inference.answer import Answer

from .answering import Answering
from .openai_answers import arguments_of, finish_reason, route_of, sureness_of
from .openai_requests import OpenAIRequest
from .problems import dump
from .streaming import EVENTS

Item = dict[str, Any]

RESPONSE_PREFIX, MESSAGE_PREFIX = "resp_", "msg_"
"""What ids have before that of the request."""


@dataclass(frozen=True)
class ResponsesReply:
    """What all events of one response have in common."""

    media_type: ClassVar[str] = EVENTS
    request: OpenAIRequest
    created: int = field(default_factory=lambda: int(time.time()))
    numbers: Iterator[int] = field(default_factory=count)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        (answer,) = answers
        is_cut = finish_reason(answer) == "length"
        status = "incomplete" if is_cut else "completed"
        calls = self._calls(answer)
        # Without calls there is a message, even an empty one.
        messages = [self._message(answer.content, status)] if answer.content or not calls else []
        prompt, generated = answer.timings.prompt_tokens, answer.tokens
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": answer.timings.reused_tokens, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + generated,
        }
        return self._head(status) | {
            "output": [*messages, *calls],
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": usage,
            "timings": asdict(answer.timings),
            **route_of(self.request),
            **sureness_of(answer),
        }

    async def lines(self, answering: Answering) -> AsyncGenerator[bytes, None]:
        """The response to a streamed request, as server-sent events."""
        has_begun = has_text = False
        async with aclosing(answering.pieces(self.request)) as pieces:
            async for piece in pieces:
                # Not before the first piece, so that an error until then has its status.
                if not has_begun:
                    has_begun = True
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._head("in_progress"))
                if piece.answer is None:
                    if not has_text:
                        has_text = True
                        yield self._begin()
                    yield self._part("output_text.delta", delta=piece.text, logprobs=[])
                else:
                    for event in self._ends(self.whole([piece.answer]), has_text=has_text):
                        yield event

    def _ends(self, whole: dict[str, Any], *, has_text: bool) -> Iterator[bytes]:
        """The events after the last piece."""
        for index, item in enumerate(whole["output"]):
            if item["type"] == "message":
                yield (b"" if has_text else self._begin()) + self._end(item)
            else:
                yield self._call(index, item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _begin(self) -> bytes:
        """The events before the first piece of text; the message is the first item."""
        item = self._message("", "in_progress") | {"content": []}
        added = self._event("response.output_item.added", output_index=0, item=item)
        return added + self._part("content_part.added", part=_text(""))

    def _end(self, item: Item) -> bytes:
        """The events after the last piece of text."""
        part = item["content"][0]
        events = self._part("output_text.done", text=part["text"], logprobs=[])
        events += self._part("content_part.done", part=part)
        return events + self._event("response.output_item.done", output_index=0, item=item)

    def _call(self, index: int, item: Item) -> bytes:
        """The events of a call, which comes as a whole."""
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": index}
        events = [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", delta=item["arguments"], **place),
            self._event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            ),
            self._event("response.output_item.done", output_index=index, item=item),
        ]
        return b"".join(events)

    def _part(self, kind: str, **values: Any) -> bytes:  # noqa: ANN401 - JSON values
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        return self._event(f"response.{kind}", **place, **values)

    def _event(self, kind: str, **values: Any) -> bytes:  # noqa: ANN401 - as above
        body = dump({"type": kind, "sequence_number": next(self.numbers), **values})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)

    def _head(self, status: str) -> dict[str, Any]:
        return {
            "id": f"{RESPONSE_PREFIX}{self.request.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.request.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "store": False,
            **self.request.repeated,
        }

    @property
    def _message_id(self) -> str:
        return f"{MESSAGE_PREFIX}{self.request.id}"

    def _message(self, text: str, status: str) -> Item:
        message = {"id": self._message_id, "type": "message", "role": "assistant"}
        return message | {"status": status, "content": [_text(text)]}

    def _calls(self, answer: Answer) -> list[Item]:
        return [
            {
                "id": f"fc_{self.request.id}_{number}",
                "type": "function_call",
                "status": "completed",
                "call_id": call.id,
                "name": call.name,
                "arguments": arguments_of(call),
            }
            for number, call in enumerate(answer.tool_calls)
        ]


def _text(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
