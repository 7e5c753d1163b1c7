"""Parses the request bodies of Ollama's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .answer_request import AnswerRequest
from .fields import Fields
from .messages import messages_of
from .models import Models
from .openai_requests import ANY_OBJECT
from .problems import RequestError
from .settings import ServerLimits

_NUMBERS = ("temperature", "top_p", "min_p", "repeat_penalty")
_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+|[-+]?0")


@dataclass(frozen=True)
class OllamaRequest:
    """A request for an answer, and whether it is streamed. Without a prompt, it only loads or unloads the model."""

    answer_request: AnswerRequest
    streams: bool = True
    unloads: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer."""
        return not self.answer_request.prompts


def chat_request(body: Mapping[str, Any], models: Models, limits: ServerLimits) -> OllamaRequest:
    """A body of /api/chat."""
    fields = Fields(body)
    messages = messages_of(fields)
    tools = [tool.values for tool in fields.objects("tools")]
    more = {"tools": tools} if tools else {}
    return _request(fields, models, limits, [messages] if messages else [], more)


def generate_request(body: Mapping[str, Any], models: Models, limits: ServerLimits) -> OllamaRequest:
    """A body of /api/generate."""
    fields = Fields(body)
    fields.forbid({"suffix": "", "template": "", "context": [], "images": []})
    prompt, system = fields.text("prompt"), fields.text("system")
    if not prompt:
        return _request(fields, models, limits, [], {})
    if fields.flag("raw"):
        return _request(fields, models, limits, [prompt], {"raw": True})
    messages = [{"role": "system", "content": system}] if system else []
    return _request(fields, models, limits, [[*messages, {"role": "user", "content": prompt}]], {})


def embed_request(body: Mapping[str, Any], models: Models) -> tuple[str, list[str]]:
    """The model and the texts in a body of /api/embed."""
    fields = Fields(body)
    model = fields.needed_text("model")
    models.info(model)
    fields.forbid({"dimensions": None})
    return model, fields.texts("input")


def old_embed_request(body: Mapping[str, Any], models: Models) -> str:
    """The text in a body of /api/embeddings, the route before /api/embed."""
    fields = Fields(body)
    models.info(fields.needed_text("model"))
    return fields.needed_text("prompt")


def model_name(body: Mapping[str, Any]) -> str:
    """The model in a body of /api/show or /api/pull; older clients call it `name`."""
    fields = Fields(body)
    return fields.text("model") or fields.needed_text("name")


def _request(
    fields: Fields, models: Models, limits: ServerLimits, prompts: list[Any], more: dict[str, Any]
) -> OllamaRequest:
    options = fields.mapping("options") or Fields({}, "options")
    # Clients of Ollama can add their own members only to the options.
    has_adapters = options.values.get("adapters") is not None
    source = Fields({**fields.values, "adapters": options.values["adapters"]}) if has_adapters else fields
    model, adapters = models.adapters_of(source)
    answer_options = _options(options, limits) | _format(fields) | _think(fields, model) | more
    if fields.flag("logprobs"):
        answer_options["logprobs"] = fields.integer("top_logprobs") or 0
    keep_alive = _seconds(fields)
    return OllamaRequest(
        AnswerRequest(model, adapters, prompts, answer_options),
        streams=fields.flag("stream", default=True),
        unloads=keep_alive == 0,
    )


def _options(options: Fields, limits: ServerLimits) -> dict[str, Any]:
    """The options that apply here. Others, such as `num_ctx` or `num_gpu`, are settings of the server."""
    answer_options: dict[str, Any] = {name: value for name in _NUMBERS if (value := options.number(name)) is not None}
    if (top_k := options.integer("top_k")) is not None:
        answer_options["top_k"] = top_k
    # A negative seed means a random one.
    if (seed := options.integer("seed")) is not None and seed >= 0:
        answer_options["seed"] = seed
    if stop := options.texts("stop"):
        answer_options["stop"] = stop
    requested = options.integer("num_predict")
    # Negative numbers mean no limit.
    bounded = requested if requested is not None and requested >= 0 else limits.answer_tokens
    answer_options["max_tokens"] = min(bounded, limits.answer_tokens)
    return answer_options


def _format(fields: Fields) -> dict[str, Any]:
    form = fields.values.get("format")
    if form in (None, ""):
        return {}
    if form == "json":
        return {"schema": ANY_OBJECT}
    if not isinstance(form, dict):
        fields.refuse("format", '"json" or a JSON Schema')
    return {"schema": form}


def _think(fields: Fields, model: str) -> dict[str, Any]:
    think = fields.values.get("think")
    if think not in (None, False, ""):
        raise RequestError(f"{model!r} does not support thinking", "leave think out, or give false", param="think")
    return {"think": False} if think is False else {}


def _seconds(fields: Fields) -> float | None:
    """`keep_alive`, which is only checked, as the bundle stays loaded; 0 if it asks to unload the model."""
    value = fields.values.get("keep_alive")
    if isinstance(value, str):
        if not _DURATION.fullmatch(value):
            fields.refuse("keep_alive", 'a number of seconds or a duration such as "5m"')
        return 0 if not re.search("[1-9]", value) else 1
    return fields.number("keep_alive")
