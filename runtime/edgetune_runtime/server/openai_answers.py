"""Answers of the runtime in, the JSON of OpenAI's API out."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from edgetune_runtime.generation import Answer

from .answering import Answering, Piece
from .models import ModelInfo, Models
from .openai_requests import OpenAIRequest
from .problems import dump

_FINISH = {"end": "stop", "stop": "stop"}
"""Other reasons (the length, the deadline, a dead end of the output constraint) leave an incomplete answer."""


@dataclass(frozen=True)
class ChatShape:
    """The shape of /v1/chat/completions."""

    object: str = "chat.completion"
    chunk: str = "chat.completion.chunk"
    prefix: str = "chatcmpl-"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece."""
        return _delta(index, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        return _delta(piece.index, {"content": piece.text})

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """What comes after the last piece."""
        return _delta(index, {}) | {"finish_reason": finish_reason(answer)}


@dataclass(frozen=True)
class CompletionShape:
    """The shape of /v1/completions."""

    object: str = "text_completion"
    chunk: str = "text_completion"
    prefix: str = "cmpl-"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        return _text_choice(index, answer.text) | {"finish_reason": finish_reason(answer)}

    def begin(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece: nothing."""
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        return _text_choice(piece.index, piece.text)

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """What comes after the last piece."""
        return _text_choice(index, "") | {"finish_reason": finish_reason(answer)}


Shape = ChatShape | CompletionShape


@dataclass(frozen=True)
class Reply:
    """What all parts of one reply have in common."""

    wanted: OpenAIRequest
    shape: Shape
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        choices = [self.shape.choice(index, answer) for index, answer in enumerate(answers)]
        return self._head(self.shape.object) | {"choices": choices, **_facts(answers)}

    async def events(self, answering: Answering) -> AsyncGenerator[bytes, None]:
        """The reply to a streamed request, as server-sent events."""
        answers: list[Answer] = []
        begun = -1
        async with aclosing(answering.pieces(self.wanted.request)) as pieces:
            async for piece in pieces:
                if piece.index > begun:
                    begun = piece.index
                    if (begin := self.shape.begin(begun)) is not None:
                        yield self._event([begin])
                if piece.answer is None:
                    yield self._event([self.shape.piece(piece)])
                else:
                    answers.append(piece.answer)
                    yield self._event([self.shape.end(piece.index, piece.answer)])
        if self.wanted.includes_usage:
            yield event(self._head(self.shape.chunk) | {"choices": [], **_facts(answers)})
        yield b"data: [DONE]\n\n"

    def _event(self, choices: Sequence[dict[str, Any]]) -> bytes:
        return event(self._head(self.shape.chunk) | {"choices": choices})

    def _head(self, kind: str) -> dict[str, Any]:
        identity = f"{self.shape.prefix}{self.id}"
        return {"id": identity, "object": kind, "created": self.created, "model": self.wanted.request.model}


def event(body: object) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % dump(body)


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
    found = [_base64(vector) if as_base64 else vector for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(found)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def finish_reason(answer: Answer) -> str:
    """Why an answer ended."""
    return _FINISH.get(answer.stop_reason, "length")


def _facts(answers: Sequence[Answer]) -> dict[str, Any]:
    """The usage, and the timings of the last answer, which OpenAI's API does not have."""
    prompt = sum(answer.timings.prompt_tokens for answer in answers)
    reused = sum(answer.timings.reused_tokens for answer in answers)
    made = sum(answer.tokens for answer in answers)
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": reused},
    }
    return {"usage": usage, "timings": asdict(answers[-1].timings)}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
