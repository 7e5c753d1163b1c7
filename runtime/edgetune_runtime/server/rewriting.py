"""Models whose chats a function of the server's user rewrites to the short prompt that an adapter was trained on."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edgetune_runtime.errors import EdgetuneError, UsageError
from edgetune_runtime.inference.answer import Answer
from edgetune_runtime.tools.calls import ToolCall

from .answer_request import AnswerRequest
from .daemon_threads import DaemonThreads
from .problems import RequestError, StoppingError

_LOG = logging.getLogger(__name__)
_FORM = "NAME=MODULE:FUNCTION"
_MAX_CALLS = 32
"""Calls of one function at once, also those that were given up and have not ended."""
_REPLY_S = 1.0
"""Seconds for the reply to an answer that ended because its time was over."""

T = TypeVar("T")


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


class Rewriter:
    """A model `name` whose chats `function` rewrites."""

    def __init__(self, name: str, function: Rewrite) -> None:
        self.name, self.function = name, function
        self._threads = DaemonThreads(f"model {name!r}", _MAX_CALLS)
        self._limits: set[asyncio.Timeout] = set()

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
        except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
            remedy = f"check the name, and that --app-dir (now {folder}) is the folder that has {module}"
            message = f"--rewrite {spec!r} cannot be loaded: {type(error).__name__}: {error}"
            raise UsageError(message, remedy) from error
        if not callable(rewrite):
            raise UsageError(f"--rewrite {spec!r} is not a function", "name a function of messages and tools")
        return cls(name, rewrite)

    async def rewrite(self, request: AnswerRequest, end_s: float) -> AnswerRequest:
        """The request to the adapter.

        RequestError for one that is not a plain chat, and if the function fails or has not returned at `end_s`, in the
        time of `time.monotonic`; BusyError if too many of its calls have not ended.
        """
        if any(isinstance(prompt, str) for prompt in request.prompts) or "schema" in request.options:
            kind = "format" if "schema" in request.options else "prompt"
            raise RequestError(f"model {self.name!r} answers chats without a {kind} of their own", "send messages only")
        options = {key: value for key, value in request.options.items() if key not in {"tools", "tool_choice"}}
        tools = request.options.get("tools", ())
        # A chat has one prompt, which is its messages.
        messages: Any = request.prompts[0]

        def read() -> tuple[RewrittenChat, str | None, str, Mapping[str, Any] | None]:
            rewritten = self.function(messages, tools)
            return rewritten, rewritten.adapter, rewritten.prompt, rewritten.schema

        rewritten, adapter, prompt, schema = await self._call("read this chat", end_s, read)
        if schema is not None:
            options["schema"] = schema

        async def finish(answer: Answer) -> Answer:
            reply_end_s = max(end_s, time.monotonic() + _REPLY_S)
            return await self._call("make a reply of the answer", reply_end_s, _replied, rewritten, answer)

        return replace(request, adapters=adapter, prompts=[prompt], options=options, finish=finish)

    def end(self) -> None:
        """End the requests whose calls run, as the server stops."""
        for limit in self._limits:
            # It may be over in the same moment.
            with suppress(RuntimeError):
                limit.reschedule(0)

    async def _call(self, action: str, end_s: float, function: Callable[..., T], *arguments: object) -> T:
        """What the user's code returns, within the time of the request."""

        def call() -> T:
            with self._errors(action):
                return function(*arguments)

        try:
            async with asyncio.timeout(end_s - time.monotonic()) as limit:
                self._limits.add(limit)
                try:
                    return await self._threads.call(call)
                finally:
                    self._limits.discard(limit)
        except TimeoutError as error:
            if time.monotonic() < end_s:
                raise StoppingError from error
            message = f"model {self.name!r} did not {action} in the time of the request"
            raise RequestError(message, "make its function faster, or raise --max-request-s") from error

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Turn an exception of the user's function into a RequestError, with its traceback in the log."""
        try:
            yield
        except EdgetuneError:
            raise
        except BaseException as error:  # in its thread, which not even a SystemExit leaves
            _LOG.exception("the rewriter %s failed", self.name)
            message = f"model {self.name!r} cannot {action}: {type(error).__name__}: {error}"
            raise RequestError(message, "see the server's log") from error


def _replied(rewritten: RewrittenChat, answer: Answer) -> Answer:
    """The answer with what goes back to the client in its place."""
    reply = rewritten.reply(answer.text)
    calls = [ToolCall(call["name"], _plain(dict(call["arguments"]))) for call in reply.calls]
    for text in (reply.text, *(call.name for call in calls)):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not text")
    return replace(answer, content=reply.text, tool_calls=tuple(calls))


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a client gets them; an error for what JSON does not have."""
    plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
    return plain
