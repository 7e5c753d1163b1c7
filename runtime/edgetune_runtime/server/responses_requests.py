"""Parses bodies of OpenAI's /v1/responses into requests of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from edgetune_runtime.text.sampling import Sampling

from .common_fields import content_of, message_of
from .fields import Fields
from .models import Models
from .openai_requests import UNSUPPORTED, OpenAIRequest, chat_request
from .settings import ServerLimits

_UNSUPPORTED: Mapping[str, object] = {
    **UNSUPPORTED,
    "previous_response_id": None,
    "conversation": None,
    "background": False,
    "prompt": None,
    "top_logprobs": 0,
    "max_tool_calls": None,
    "n": 1,
}
# Its limit of tokens has another name here.
_SAMPLING = tuple(field.name for field in fields_of(Sampling) if field.name != "max_tokens")
_SAME = ("model", "adapters", "stream", *_SAMPLING, "min_confidence", "unsure", "ask")
_ITEMS = ("message", "function_call", "function_call_output")
_ECHOED = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p")


def responses_request(body: Mapping[str, Any], models: Models, limits: ServerLimits) -> OpenAIRequest:
    """A body of /v1/responses."""
    fields = Fields(body)
    fields.forbid(_UNSUPPORTED)
    # Clients of agents always ask for the reasoning, and an answer has none.
    if not all(name.startswith("reasoning.") for name in fields.texts("include")):
        fields.refuse("include", "none, or reasoning.encrypted_content, which changes nothing")
    chat = {name: body[name] for name in _SAME if name in body}
    chat |= {"messages": _messages(fields), "max_completion_tokens": fields.integer("max_output_tokens")}
    chat |= {"tools": _tools(fields), "tool_choice": _tool_choice(fields), "response_format": _format(fields)}
    chat["parallel_tool_calls"] = parallel = fields.flag("parallel_tool_calls", default=True)
    reasoning = fields.mapping("reasoning")
    chat["reasoning_effort"] = None if reasoning is None else reasoning.text("effort")
    repeated = {name: body.get(name) for name in _ECHOED}
    repeated |= {"tools": body.get("tools") or [], "tool_choice": body.get("tool_choice") or "auto"}
    repeated |= {"parallel_tool_calls": parallel, "text": body.get("text") or {"format": {"type": "text"}}}
    return replace(chat_request(chat, models, limits), repeated=repeated)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    value = fields.values.get("input")
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    else:
        messages = []
        for item in fields.objects("input"):
            _add(messages, item)
    if not messages:
        fields.refuse("input", "a string or a list of messages")
    instructions = fields.text("instructions")
    return [{"role": "system", "content": instructions}, *messages] if instructions else messages


def _add(messages: list[dict[str, Any]], item: Fields) -> None:
    """Add an item of the input; calls become part of the assistant's message before them."""
    kind = item.choice("type", _ITEMS) or "message"
    if kind == "message":
        # Calls are items of their own here.
        item.forbid({"tool_calls": []})
        messages.append(message_of(item))
    elif kind == "function_call_output":
        call_id = item.needed_text("call_id")
        messages.append({"role": "tool", "content": content_of(item, "output"), "tool_call_id": call_id})
    else:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item.needed_text("name"), "arguments": item.text("arguments") or "{}"}
        call = {"id": item.needed_text("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools, which are flat here."""
    tools = []
    for tool in fields.objects("tools"):
        if tool.text("type") != "function":
            tool.refuse("type", "function, as other tools are OpenAI's own")
        tools.append({"type": "function", "function": {k: v for k, v in tool.values.items() if k != "type"}})
    return tools


def _tool_choice(fields: Fields) -> object:
    choice = fields.values.get("tool_choice")
    if not isinstance(choice, dict):
        return fields.choice("tool_choice", ("auto", "none", "required"))
    return {"type": "function", "function": {"name": Fields(choice, "tool_choice").needed_text("name")}}


def _format(fields: Fields) -> dict[str, Any] | None:
    """`text.format`, whose schema has a level less than that of `response_format`."""
    text = fields.mapping("text")
    form = None if text is None else text.mapping("format")
    if form is None or form.choice("type", ("text", "json_object", "json_schema")) != "json_schema":
        return None if form is None else dict(form.values)
    if form.mapping("schema") is None:
        form.refuse("schema", "a JSON Schema")
    return {"type": "json_schema", "json_schema": {"schema": form.values["schema"]}}
