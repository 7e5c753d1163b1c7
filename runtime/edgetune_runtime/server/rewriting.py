"""Models whose chats a function of the server's user rewrites to the short prompt that an adapter was trained on."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.inference.answer import Answer
from edgetune_runtime.tools.calls import ToolCall

from .answer_request import AnswerRequest
from .problems import RequestError

_LOG = logging.getLogger(__name__)
_FORM = "NAME=MODULE:FUNCTION"


class RewriterReply(Protocol):
    """What goes back to the client: a text, or calls with `name` and `arguments`."""

    @property
    def text(self) -> str:
        """What is said."""

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """The calls."""


class RewrittenChat(Protocol):
    """A chat in short: the adapter, its prompt, and the schema of its answer."""

    @property
    def adapter(self) -> str | None:
        """The adapter; None for the base."""

    @property
    def prompt(self) -> str:
        """The prompt."""

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON Schema; None for the output constraint of the adapter, if it has one."""

    def reply(self, answer: str) -> RewriterReply:
        """What an answer of the adapter means."""


Rewrite = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], RewrittenChat]
"""Takes the messages and the tools of a chat, as the client sent them."""


@dataclass(frozen=True)
class Rewriter:
    """A model `name` whose chats `function` rewrites."""

    name: str
    function: Rewrite

    @classmethod
    def load(cls, spec: str, folder: Path) -> Rewriter:
        """The function that NAME=MODULE:FUNCTION names; modules are also looked for in `folder`.

        Raises UsageError for another form, and for a module or function that cannot be loaded.
        """
        name, equals, place = spec.partition("=")
        module, colon, function = place.partition(":")
        if not (name and equals and module and colon and function):
            raise UsageError(
                f"--rewrite {spec!r} is not {_FORM}", f"give {_FORM}, such as assist=assist.prompt:rewrite"
            )
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        try:
            rewrite = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, SyntaxError) as error:
            remedy = f"check the name, and that --app-dir (now {folder}) is the folder that has {module}"
            raise UsageError(f"--rewrite {spec!r} cannot be loaded: {error}", remedy) from error
        if not callable(rewrite):
            raise UsageError(f"--rewrite {spec!r} is not a function", "name a function of messages and tools")
        return cls(name, rewrite)

    async def rewrite(self, request: AnswerRequest) -> AnswerRequest:
        """The request to the adapter. RequestError for one that is not a plain chat, or if the function fails."""
        if any(isinstance(prompt, str) for prompt in request.prompts) or "schema" in request.options:
            kind = "format" if "schema" in request.options else "prompt"
            raise RequestError(f"model {self.name!r} answers chats without a {kind} of their own", "send messages only")
        options = {key: value for key, value in request.options.items() if key not in {"tools", "tool_choice"}}
        tools = request.options.get("tools", ())
        # A chat has one prompt, which is its messages.
        messages: Any = request.prompts[0]
        with self._errors("read this chat"):
            rewritten = await asyncio.to_thread(self.function, messages, tools)
            adapter, prompt, schema = rewritten.adapter, rewritten.prompt, rewritten.schema
        if schema is not None:
            options["schema"] = schema

        def finish(answer: Answer) -> Answer:
            with self._errors("make a reply of the answer"):
                reply = rewritten.reply(answer.text)
                calls = [ToolCall(call["name"], _plain(dict(call["arguments"]))) for call in reply.calls]
                for text in (reply.text, *(call.name for call in calls)):
                    if not isinstance(text, str):
                        raise TypeError(f"{text!r} is not text")
                return replace(answer, content=reply.text, tool_calls=tuple(calls))

        return replace(request, adapters=adapter, prompts=[prompt], options=options, finish=finish)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Turn an exception of the user's function into a RequestError, with its traceback in the log."""
        try:
            yield
        except EdgetuneError:
            raise
        except Exception as error:
            _LOG.exception("the rewriter %s failed", self.name)
            message = f"model {self.name!r} cannot {action}: {type(error).__name__}: {error}"
            raise RequestError(message, "see the server's log") from error


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a client gets them; an error for what JSON does not have."""
    plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
    return plain
