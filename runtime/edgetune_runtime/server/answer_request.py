"""A request for answers, whichever API the client speaks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from edgetune_runtime.inference.adapter_choice import Adapters
from edgetune_runtime.inference.answer import Answer
from edgetune_runtime.inference.routing.router import Route
from edgetune_runtime.text.chat import Prompt

ARRIVED: ContextVar[float] = ContextVar("ARRIVED")
"""When the request that is being answered arrived: its time begins before its body is read."""
CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""The address that it came from."""


@dataclass(frozen=True)
class AnswerRequest:
    """What a client asks for, whichever API it speaks.

    `model` is the name that it used; for `auto` that of the model that the router chose, and `route` is its choice.
    `prompts` each get `count` answers. `options` are those of `Runtime.generate`, `raw` among them. `streams`: answers
    are sent in pieces, with at most `max_calls` tool calls each. `finish` makes of a whole answer what is sent; its
    text is then not sent in pieces. A question in place of an unsure answer is sent as it is. `id` is that of the
    reply, and of its answers in a log.
    """

    model: str
    adapters: Adapters
    prompts: Sequence[Prompt]
    options: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    streams: bool = False
    max_calls: int | None = None
    finish: Callable[[Answer], Awaitable[Answer]] | None = None
    route: Route | None = None
    arrived: float = field(default_factory=lambda: ARRIVED.get(time.monotonic()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class ClassifyRequest:
    """A request for the label of each of `texts`, with the options of `Runtime.classify`.

    `model` is the name that the client used, and `id` that of the reply, and of its labels in a log.
    """

    model: str
    adapters: Adapters
    texts: Sequence[str]
    options: dict[str, Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
