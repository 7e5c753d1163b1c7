"""Parses the members of requests that the APIs of OpenAI and Ollama share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fields import Fields
from .models import Models
from .settings import ServerLimits

ANY_OBJECT: Mapping[str, Any] = {"type": "object", "additionalProperties": True}
"""The schema of an answer that may be any JSON object."""


def sampling_options(fields: Fields, limits: ServerLimits, max_tokens: int | None) -> dict[str, Any]:
    """How tokens are sampled, and how many, at most as many as the server's limit."""
    options: dict[str, Any] = {n: fields.number(n) for n in ("temperature", "top_p", "min_p", "repeat_penalty")}
    options |= {name: fields.integer(name) for name in ("top_k", "seed")}
    options["stop"] = fields.texts("stop") or None
    options["max_tokens"] = limits.answer_tokens if max_tokens is None else min(max_tokens, limits.answer_tokens)
    return {name: value for name, value in options.items() if value is not None}


def tool_options(fields: Fields) -> dict[str, Any]:
    """The tools."""
    tools = [tool.values for tool in fields.objects("tools")]
    return {"tools": tools} if tools else {}


def logprob_options(fields: Fields) -> dict[str, Any]:
    """How many of the most likely tokens to report at each step."""
    return {"logprobs": fields.integer("top_logprobs") or 0} if fields.flag("logprobs") else {}


def texts_to_embed(fields: Fields, models: Models) -> tuple[str, list[str]]:
    """The model and the texts of a request for embeddings."""
    model = fields.needed_text("model")
    models.info(model)
    fields.forbid({"dimensions": None})
    return model, fields.texts("input")
