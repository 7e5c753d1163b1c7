"""Parses the request bodies of Ollama's API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .answer_request import AnswerRequest
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

_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+|[-+]?0")


@dataclass(frozen=True)
class OllamaRequest(AnswerRequest):
    """A request for an answer; without a prompt, it only loads the model, or unloads it if `unloads`."""

    unloads: bool = False


def chat_request(body: Mapping[str, Any], models: Models, limits: ServerLimits) -> OllamaRequest:
    """A body of /api/chat."""
    fields = Fields(body)
    messages = messages_of(fields)
    return _request(fields, models, limits, [messages] if messages else [], tool_options(fields))


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
    return texts_to_embed(Fields(body), models)


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
    model, adapters, route = models.choice_of(source, prompts)
    answer_options = _options(options, limits) | _format(fields) | _think(fields, model)
    answer_options |= logprob_options(fields) | more
    streams = fields.flag("stream", default=True)
    unloads = _seconds(fields) == 0
    return OllamaRequest(model, adapters, prompts, answer_options, streams=streams, route=route, unloads=unloads)


def _options(fields: Fields, limits: ServerLimits) -> dict[str, Any]:
    """The options that apply here. Others, such as `num_ctx` or `num_gpu`, are settings of the server."""
    # 0 tokens mean no limit here.
    return sampling_options(fields, limits, fields.integer("num_predict") or None) | unsure_options(fields)


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
