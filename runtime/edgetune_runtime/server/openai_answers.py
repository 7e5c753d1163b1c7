"""Writes answers as the JSON of OpenAI's API."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, ClassVar
from urllib.parse import quote

from edgetune_runtime.bundle import MARK
from edgetune_runtime.decoding.logprobs import TokenLogprob
from edgetune_runtime.inference.answer import Answer
from edgetune_runtime.inference.classification import Classification
from edgetune_runtime.tools.calls import ToolCall

from .answer_request import AnswerRequest, ClassifyRequest
from .answering import Answering, Piece
from .models import ModelInfo, Models
from .openai_requests import OpenAIRequest
from .streaming import EVENTS, event

CONFIDENCE, UNSURE = "X-Edgetune-Confidence", "X-Edgetune-Unsure"
"""The headers of `sureness_headers`."""
LABEL_PREFIX = "classify-"
"""Of the id of a reply to /v1/classify."""


@dataclass(frozen=True)
class ChatShape:
    """The shape of /v1/chat/completions."""

    object: str = "chat.completion"
    chunk: str = "chat.completion.chunk"
    prefix: str = "chatcmpl-"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.tool_calls:
            message |= {"content": answer.content or None, "tool_calls": list(map(_call, answer.tool_calls))}
        return {"index": index, "message": message, **self._end(answer)}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """The parts before the first piece."""
        return [_delta(index, {"role": "assistant", "content": ""})]

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        return _delta(piece.index, {"content": piece.text})

    def end(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """The parts after the last piece: the calls, then why the answer ended."""
        calls = [{"index": number, **_call(call)} for number, call in enumerate(answer.tool_calls)]
        parts = [_delta(index, {"tool_calls": [call]}) for call in calls]
        return [*parts, _delta(index, {}) | self._end(answer)]

    def _end(self, answer: Answer) -> dict[str, Any]:
        logprobs = None
        if answer.logprobs is not None:
            content = [
                logprob(token) | {"top_logprobs": [logprob(other) for other in token.top]} for token in answer.logprobs
            ]
            logprobs = {"content": content, "refusal": None}
        reason = "tool_calls" if answer.tool_calls and not answer.is_cut_off else finish_reason(answer)
        return {"logprobs": logprobs, "finish_reason": reason, **sureness_of(answer)}


@dataclass(frozen=True)
class CompletionShape:
    """The shape of /v1/completions."""

    object: str = "text_completion"
    chunk: str = "text_completion"
    prefix: str = "cmpl-"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        return _text_choice(index, answer.text) | self._end(answer)

    def begin(self, _index: int) -> list[dict[str, Any]]:
        """The parts before the first piece: none."""
        return []

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        return _text_choice(piece.index, piece.text)

    def end(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """The part after the last piece."""
        return [_text_choice(index, "") | self._end(answer)]

    def _end(self, answer: Answer) -> dict[str, Any]:
        logprobs = None
        if answer.logprobs is not None:
            texts = [token.text for token in answer.logprobs]
            logprobs = {
                "tokens": texts,
                "token_logprobs": [token.logprob for token in answer.logprobs],
                "top_logprobs": [{other.text: other.logprob for other in token.top} for token in answer.logprobs],
                "text_offset": [0, *accumulate(map(len, texts[:-1]))] if texts else [],
            }
        return {"logprobs": logprobs, "finish_reason": finish_reason(answer), **sureness_of(answer)}


Shape = ChatShape | CompletionShape


@dataclass(frozen=True)
class OpenAIReply:
    """What all parts of one reply have in common."""

    media_type: ClassVar[str] = EVENTS
    request: OpenAIRequest
    shape: Shape
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        choices = [self.shape.choice(index, answer) for index, answer in enumerate(answers)]
        return self._head(self.shape.object) | {"choices": choices, **self._facts(answers)}

    async def lines(self, answering: Answering) -> AsyncGenerator[bytes, None]:
        """The reply to a streamed request, as server-sent events."""
        answers: list[Answer] = []
        begun = -1
        async with aclosing(answering.pieces(self.request)) as pieces:
            async for piece in pieces:
                if piece.index > begun:
                    begun = piece.index
                    for part in self.shape.begin(begun):
                        yield self._event(part)
                if piece.answer is None:
                    yield self._event(self.shape.piece(piece))
                else:
                    answers.append(piece.answer)
                    for part in self.shape.end(piece.index, piece.answer):
                        yield self._event(part)
        if self.request.includes_usage:
            yield event(self._head(self.shape.chunk) | {"choices": [], **self._facts(answers)})
        yield b"data: [DONE]\n\n"

    def _facts(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The usage, and the timings of the last answer, which OpenAI's API does not have.

        The answers to one prompt count its tokens once.
        """
        count = self.request.count
        prompt = sum(answer.timings.prompt_tokens for answer in answers[::count])
        reused = sum(answer.timings.reused_tokens for answer in answers[::count])
        generated = sum(answer.tokens for answer in answers)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": reused},
        }
        return {"usage": usage, "timings": asdict(answers[-1].timings), **route_of(self.request)}

    def _event(self, choice: dict[str, Any]) -> bytes:
        return event(self._head(self.shape.chunk) | {"choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        identity = f"{self.shape.prefix}{self.request.id}"
        return {"id": identity, "object": kind, "created": self.created, "model": self.request.model}


def route_of(request: AnswerRequest) -> dict[str, Any]:
    """The choice of the router for a request to `auto`, which the APIs do not have either."""
    return {} if request.route is None else {"route": asdict(request.route)}


def sureness_of(answer: Answer) -> dict[str, Any]:
    """How sure an answer is, if that is known or was asked for, and what answered instead of an unsure one."""
    if answer.confidence is None and not answer.is_unsure:
        return {}
    rounded = None if answer.confidence is None else round(answer.confidence, 4)
    return {"confidence": rounded, "is_unsure": answer.is_unsure, "instead": answer.instead}


def sureness_headers(answers: Sequence[Answer] | Sequence[Classification]) -> dict[str, str]:
    """The lowest confidence of a reply's answers, and what answered in place of the first unsure one, or `mark`."""
    confidences = [answer.confidence for answer in answers if answer.confidence is not None]
    instead = (answer.instead if isinstance(answer, Answer) else None for answer in answers if answer.is_unsure)
    unsure = [name or MARK for name in instead]
    headers = {CONFIDENCE: f"{min(confidences):.4f}"} if confidences else {}
    return headers | ({UNSURE: quote(unsure[0])} if unsure else {})


def model_list(models: Models) -> dict[str, Any]:
    """The reply to /v1/models."""
    return {"object": "list", "data": [model_object(models, info) for info in models.listed.values()]}


def model_object(models: Models, info: ModelInfo) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    return {
        "id": info.name,
        "object": "model",
        "created": int(models.created.timestamp()),
        "owned_by": models.manifest.name,
        "parent": info.parent,
    }


def embedding_list(model: str, vectors: Sequence[Sequence[float]], tokens: int, *, as_base64: bool) -> dict[str, Any]:
    """The reply to /v1/embeddings."""
    packed = (struct.pack(f"<{len(vector)}f", *vector) for vector in vectors)
    encoded = [base64.b64encode(vector).decode() for vector in packed] if as_base64 else vectors
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(encoded)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def label_list(request: ClassifyRequest, found: Sequence[Classification]) -> dict[str, Any]:
    """The reply to /v1/classify."""
    data = [
        {
            "index": index,
            "label": one.label,
            "confidence": one.confidence,
            "is_unsure": one.is_unsure,
            "is_out_of_scope": one.is_out_of_scope,
            "probabilities": one.probabilities,
            "unseen": one.unseen,
            **({} if one.route is None else {"route": asdict(one.route)}),
        }
        for index, one in enumerate(found)
    ]
    created = int(time.time())
    return {
        "id": f"{LABEL_PREFIX}{request.id}", "object": "list", "created": created, "model": request.model, "data": data
    }  # fmt: skip


def finish_reason(answer: Answer) -> str:
    """Why an answer ended: a deadline or a dead end of the output constraint cuts it off as the length does."""
    return "length" if answer.is_cut_off else "stop"


def arguments_of(call: ToolCall) -> str:
    """The arguments of a call as OpenAI's API has them: JSON in a text."""
    return json.dumps(call.arguments, ensure_ascii=False)


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments_of(call)}}


def logprob(token: TokenLogprob) -> dict[str, Any]:
    """A token with its log probability."""
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}
