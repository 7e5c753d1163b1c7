"""Chat messages of a request, in the form that the runtime reads."""

from __future__ import annotations

from typing import Any

from .fields import Fields

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """The messages in member `messages`; RequestError for one with an unknown role, or with more than text."""
    return [message_of(message) for message in fields.objects("messages")]


def message_of(fields: Fields) -> dict[str, Any]:
    """One message; errors as those of `messages_of`."""
    role = fields.choice("role", _ROLES)
    if role is None:
        fields.refuse("role", f"one of {', '.join(_ROLES)}")
    fields.forbid({"images": [], "audio": None})
    # `developer` is what newer models of OpenAI call the system prompt.
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(fields)}
    if calls := fields.values.get("tool_calls"):
        message["tool_calls"] = calls
    if (call := fields.text("tool_call_id")) is not None:
        message["tool_call_id"] = call
    # Ollama's clients call the name of the tool whose result this is `tool_name`.
    if (name := fields.text("tool_name") or fields.text("name")) is not None:
        message["name"] = name
    return message


def _content(fields: Fields) -> str:
    content = fields.values.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in fields.objects("content"):
        kind = part.choice("type", _TEXT_PARTS) or "text"
        texts.append(part.text("refusal" if kind == "refusal" else "text") or "")
    return "".join(texts)
