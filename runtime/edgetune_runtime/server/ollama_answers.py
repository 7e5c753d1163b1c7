"""Writes answers as the JSON of Ollama's API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

from edgetune_runtime.decoding.logprobs import TokenLogprob
from edgetune_runtime.inference.answer import Answer

from .answering import Answering
from .models import ModelInfo, Models
from .ollama_requests import OllamaRequest
from .openai_answers import finish_reason, logprob, route_of, sureness_of
from .streaming import NDJSON, line

VERSION = "0.12.11"
"""The version of Ollama whose API this is; clients refuse one that is too old for what they need."""
_FOREVER = "2999-12-31T23:59:59Z"


@dataclass(frozen=True)
class OllamaReply:
    """What all lines of one reply have in common; `is_chat` says whether it is one of /api/chat or /api/generate."""

    media_type: ClassVar[str] = NDJSON
    request: OllamaRequest
    is_chat: bool
    begun: int = field(default_factory=time.monotonic_ns)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply to a request that is not streamed, or that only loads or unloads a model."""
        if not answers:
            reason = "unload" if self.request.unloads else "load"
            return self._head() | self._text("") | {"done": True, "done_reason": reason}
        (answer,) = answers
        return self._head() | self._text(answer.content, _calls(answer)) | self._end(answer)

    async def lines(self, answering: Answering) -> AsyncGenerator[bytes, None]:
        """The reply to a streamed request, a JSON object per line."""
        async with aclosing(answering.pieces(self.request)) as pieces:
            async for piece in pieces:
                if piece.answer is None:
                    yield line(self._head() | self._text(piece.text) | {"done": False})
                else:
                    if calls := _calls(piece.answer):
                        yield line(self._head() | self._text("", calls) | {"done": False})
                    yield line(self._head() | self._text("") | self._end(piece.answer))

    def _head(self) -> dict[str, Any]:
        return {"model": self.request.model, "created_at": _time(datetime.now(UTC))}

    def _text(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        if not self.is_chat:
            return {"response": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        return {"message": message | ({"tool_calls": calls} if calls else {})}

    def _end(self, answer: Answer) -> dict[str, Any]:
        total_ns = time.monotonic_ns() - self.begun
        prompt_ns = int(answer.timings.ttft_ms * 1e6)
        speed = answer.timings.tokens_per_s
        logprobs = {} if answer.logprobs is None else {"logprobs": list(map(_logprob, answer.logprobs))}
        return logprobs | {
            **route_of(self.request),
            **sureness_of(answer),
            # Not in Ollama's API: for corrections.
            "id": self.request.id,
            "done": True,
            "done_reason": finish_reason(answer),
            "total_duration": total_ns,
            # The bundle is loaded; what is left is the switch to the adapter.
            "load_duration": int(answer.timings.switch_us * 1e3),
            "prompt_eval_count": answer.timings.prompt_tokens,
            "prompt_eval_duration": prompt_ns,
            "eval_count": answer.tokens,
            "eval_duration": int(max(answer.tokens - 1, 0) / speed * 1e9) if speed else 0,
        }


def model_list(models: Models) -> dict[str, Any]:
    """The reply to /api/tags."""
    return {"models": [_listed(models, info) | _modified(models) for info in models.listed.values()]}


def loaded_list(models: Models, context_length: int) -> dict[str, Any]:
    """The reply to /api/ps: all models, as an adapter that is not in memory is loaded within milliseconds."""
    loaded = {"expires_at": _FOREVER, "size_vram": 0, "context_length": context_length}
    return {"models": [_listed(models, info) | loaded for info in models.listed.values()]}


def model_facts(models: Models, info: ModelInfo, context_length: int) -> dict[str, Any]:
    """The reply to /api/show."""
    base = models.manifest.base
    adapter = models.manifest.adapters.get(info.name)
    facts = {
        "general.architecture": base.architecture,
        "general.basename": base.name,
        "general.parameter_count": base.parameters,
        f"{base.architecture}.block_count": base.layers,
        f"{base.architecture}.context_length": context_length,
    }
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "system": (adapter.system if adapter else None) or "",
        "details": _details(models, info),
        "model_info": facts,
        "capabilities": ["completion", "tools"] if base.is_decoder else ["embedding"],
        **_modified(models),
    }


def _listed(models: Models, info: ModelInfo) -> dict[str, Any]:
    name = f"{info.name}:latest"
    facts = {"name": name, "model": name, "size": info.bytes, "digest": info.digest}
    return facts | {"details": _details(models, info)}


def _modified(models: Models) -> dict[str, Any]:
    return {"modified_at": _time(models.created)}


def _details(models: Models, info: ModelInfo) -> dict[str, Any]:
    base = models.manifest.base
    return {
        "parent_model": info.parent or "",
        "format": models.engine,
        "family": base.architecture,
        "families": [base.architecture],
        "parameter_size": f"{base.parameters / 1e6:.0f}M",
        "quantization_level": base.types_in(models.engine),
    }


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "function": {"index": index, "name": call.name, "arguments": call.arguments}}
        for index, call in enumerate(answer.tool_calls)
    ]


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return logprob(token) | ({"top_logprobs": list(map(logprob, token.top))} if token.top else {})


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
