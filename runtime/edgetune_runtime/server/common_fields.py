"""Parses what requests of the APIs have in common: messages, sampling, tools, texts to embed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .fields import Fields
from .models import Models
from .settings import ServerLimits

ANY_OBJECT: Mapping[str, Any] = {"type": "object", "additionalProperties": True}
"""The schema of an answer that may be any JSON object."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """The messages in member `messages`, without system prompts that are empty.

    RequestError for one with an unknown role, or with more than text.
    """
    messages = [message_of(message) for message in fields.objects("messages")]
    return [message for message in messages if message["role"] != "system" or message["content"]]


def message_of(fields: Fields) -> dict[str, Any]:
    """One message; errors as those of `messages_of`."""
    role = fields.choice("role", _ROLES)
    if role is None:
        fields.refuse("role", f"one of {', '.join(_ROLES)}")
    fields.forbid({"images": [], "audio": None, "function_call": None})
    # `developer` is what newer models of OpenAI call the system prompt.
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content_of(fields)}
    if calls := fields.values.get("tool_calls"):
        message["tool_calls"] = calls
    if (call := fields.text("tool_call_id")) is not None:
        message["tool_call_id"] = call
    # Ollama's clients call the name of the tool whose result this is `tool_name`.
    if (name := fields.text("tool_name") or fields.text("name")) is not None:
        message["name"] = name
    return message


def content_of(fields: Fields, name: str = "content") -> str:
    """The text in a member that is a text or a list of parts; RequestError for parts that are not text."""
    content = fields.values.get(name)
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in fields.objects(name):
        kind = part.choice("type", _TEXT_PARTS) or "text"
        texts.append(part.text("refusal" if kind == "refusal" else "text") or "")
    return "".join(texts)


def sampling_options(fields: Fields, limits: ServerLimits, max_tokens: int | None) -> dict[str, Any]:
    """How tokens are sampled, and how many, at most as many as the server's limit.

    What clients of llama.cpp and Ollama send counts as there: negative numbers for no limit, a random seed and no
    `top_k`, and stop texts that are empty.
    """
    options: dict[str, Any] = {n: fields.number(n) for n in ("temperature", "top_p", "min_p", "repeat_penalty")}
    top_k, seed = fields.integer("top_k"), fields.integer("seed")
    options |= {"top_k": top_k and max(top_k, 0), "seed": seed if seed is not None and seed >= 0 else None}
    options["stop"] = [text for text in fields.texts("stop") if text] or None
    if max_tokens is None or max_tokens < 0:
        max_tokens = limits.answer_tokens
    options["max_tokens"] = min(max_tokens, limits.answer_tokens)
    return {name: value for name, value in options.items() if value is not None}


def unsure_options(fields: Fields) -> dict[str, Any]:
    """From which confidence on answers are sure enough, and what answers in place of others."""
    return {
        "min_confidence": fields.number("min_confidence"),
        "unsure": fields.text("unsure"),
        "ask": fields.text("ask"),
    }


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
