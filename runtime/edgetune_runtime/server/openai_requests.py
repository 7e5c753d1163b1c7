"""Parses the request bodies of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune_runtime.bundle import CLASSIFY
from edgetune_runtime.tools.definitions import MODES

from .answer_request import AnswerRequest, ClassifyRequest
from .common_fields import (
    ANY_OBJECT,
    logprob_options,
    messages_of,
    sampling_options,
    texts_to_embed,
    tool_options,
    unsure_options,
)
from .fields import Fields
from .models import Models
from .problems import RequestError
from .settings import ServerLimits

_CHOICES = 'auto, none, required, or {"type": "function", "function": {"name": NAME}}'
UNSUPPORTED: Mapping[str, object] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "audio": None,
    "modalities": ["text"],
}
"""Options that are refused by all routes that answer, with the values that change nothing."""


@dataclass(frozen=True)
class OpenAIRequest(AnswerRequest):
    """A request whose streamed reply may have the usage; the reply to /v1/responses repeats the members `repeated`."""

    includes_usage: bool = False
    repeated: Mapping[str, Any] = field(default_factory=dict)


def chat_request(body: Mapping[str, Any], models: Models, limits: ServerLimits) -> OpenAIRequest:
    """A body of /v1/chat/completions."""
    fields = Fields(body)
    fields.forbid({**UNSUPPORTED, "functions": [], "function_call": "none", "web_search_options": None})
    messages = messages_of(fields)
    if not messages:
        fields.refuse("messages", "at least one message")
    options = _options(fields, limits) | _response_format(fields) | _tools(fields) | _logprobs(fields)
    if fields.text("reasoning_effort") == "none":
        options["think"] = False
    request = _request(fields, models, limits, [messages], options)
    return request if fields.flag("parallel_tool_calls", default=True) else replace(request, max_calls=1)


def completion_request(body: Mapping[str, Any], models: Models, limits: ServerLimits) -> OpenAIRequest:
    """A body of /v1/completions. A prompt of token numbers is refused, as tokens differ from base to base."""
    fields = Fields(body)
    fields.forbid({**UNSUPPORTED, "suffix": "", "best_of": 1, "echo": False})
    prompts = fields.texts("prompt")
    if not 0 < len(prompts) <= limits.answers:
        fields.refuse("prompt", f"1 to {limits.answers} strings")
    options = _options(fields, limits) | {"raw": True}
    if (logprobs := fields.integer("logprobs")) is not None:
        options["logprobs"] = logprobs
    return _request(fields, models, limits, prompts, options)


def embedding_request(body: Mapping[str, Any], models: Models) -> tuple[str, list[str], bool]:
    """The model and the texts in a body of /v1/embeddings, and whether it asks for vectors in base64."""
    fields = Fields(body)
    model, texts = texts_to_embed(fields, models)
    if not texts:
        fields.refuse("input", "a string or a list of strings")
    # OpenAI's own client asks for base64.
    return model, texts, fields.choice("encoding_format", ("float", "base64")) == "base64"


def classify_request(body: Mapping[str, Any], models: Models) -> ClassifyRequest:
    """A body of /v1/classify, with the members of vLLM's API, and options of `Runtime.classify`.

    The labels are the adapter's: how long those of a client would take is not bounded.
    """
    fields = Fields(body)
    fields.forbid({"labels": [], "adapters": {}})
    model, texts = fields.needed_text("model"), fields.texts("input")
    if not texts:
        fields.refuse("input", "a string or a list of strings")
    options = {"exact": fields.flag("exact"), "min_confidence": fields.number("min_confidence")}
    return ClassifyRequest(model, models.adapters(model, CLASSIFY), texts, options)


def _request(
    fields: Fields, models: Models, limits: ServerLimits, prompts: list[Any], options: dict[str, Any]
) -> OpenAIRequest:
    count = fields.integer("n")
    count = 1 if count is None else count
    if not 0 < count * len(prompts) <= limits.answers:
        fields.refuse("n", f"1 to {limits.answers // len(prompts)}")
    model, adapters, route = models.choice_of(fields, prompts)
    stream_options = fields.mapping("stream_options")
    includes_usage = stream_options is not None and stream_options.flag("include_usage")
    streams = fields.flag("stream")
    return OpenAIRequest(model, adapters, prompts, options, count, streams, route=route, includes_usage=includes_usage)


def _options(fields: Fields, limits: ServerLimits) -> dict[str, Any]:
    max_tokens = fields.integer("max_completion_tokens")
    max_tokens = fields.integer("max_tokens") if max_tokens is None else max_tokens
    return sampling_options(fields, limits, max_tokens) | unsure_options(fields)


def _tools(fields: Fields) -> dict[str, Any]:
    options = tool_options(fields)
    choice = fields.values.get("tool_choice")
    if isinstance(choice, dict):
        function = Fields(choice, "tool_choice").mapping("function")
        # Only tools that are functions can be named.
        name = fields.refuse("tool_choice", _CHOICES) if function is None else function.needed_text("name")
        if name in MODES:
            message = f"tool_choice names the function {name!r}, which would be taken for a mode"
            raise RequestError(message, "rename it", param="tool_choice")
        options["tool_choice"] = name
    elif choice is not None:
        options["tool_choice"] = fields.choice("tool_choice", MODES)
    return options


def _logprobs(fields: Fields) -> dict[str, Any]:
    if fields.integer("top_logprobs") and not fields.flag("logprobs"):
        fields.refuse("top_logprobs", "logprobs: true beside it")
    return logprob_options(fields)


def _response_format(fields: Fields) -> dict[str, Any]:
    """The output constraint of `response_format`; `text` keeps the adapter's own."""
    response_format = fields.mapping("response_format")
    kind = None if response_format is None else response_format.choice("type", ("text", "json_object", "json_schema"))
    if response_format is None or kind in (None, "text"):
        return {}
    if kind == "json_object":
        # llama.cpp's servers take a schema with it.
        own = response_format.mapping("schema")
        return {"schema": own.values if own is not None and own.values else ANY_OBJECT}
    json_schema = response_format.mapping("json_schema")
    schema = None if json_schema is None else json_schema.mapping("schema")
    if schema is None:
        path = "response_format.json_schema.schema"
        raise RequestError(f"{path} is missing", "give a JSON Schema", param=path)
    return {"schema": schema.values}
