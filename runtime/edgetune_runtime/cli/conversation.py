"""`edgetune-run chat`: the conversation on the terminal, its commands and its output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgetune_runtime.bundle import AUTO
from edgetune_runtime.errors import EdgetuneError, UsageError, VerificationError
from edgetune_runtime.states.cache import name_of

if TYPE_CHECKING:
    from edgetune_runtime.decoding.logprobs import TokenLogprob
    from edgetune_runtime.inference.answer import Answer, Stream
    from edgetune_runtime.inference.runtime import Runtime
    from edgetune_runtime.inference.session import Session
    from edgetune_runtime.tools.calls import ToolCall

PROGRAM = "edgetune-run"

CHAT_HELP = """/use NAME  switch to an adapter (each has its own history)
/base      switch to the plain base
/new       clear the history of this adapter
/help      show this help
/quit      quit; so does Ctrl-D. Ctrl-C stops an answer"""


class Conversation:
    """A conversation on the terminal, with a separate history for each choice of adapters."""

    def __init__(
        self, runtime: Runtime, adapters: Sequence[str], sampling: Mapping[str, Any], *, as_json: bool
    ) -> None:
        self._runtime = runtime
        self._sampling = sampling
        self._as_json = as_json
        self._sessions: dict[str, Session] = {}
        self._use(adapter_choice(runtime, adapters))

    def run(self) -> None:
        """Answer each line of standard input, or run it if it is a command."""
        self._say(f"adapters: {', '.join(self._runtime.adapters) or 'none'}; /help shows the commands")
        while (line := self._read()) is not None:
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._answer(line)
            except EdgetuneError as error:
                self._say(f"{PROGRAM}: {error}")

    def _read(self) -> str | None:
        if sys.stdin.isatty():
            print(f"{name_of(self._adapters)}> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _command(self, command: str, rest: str = "") -> None:
        if command == "/use" and rest:
            self._use(adapter_choice(self._runtime, rest.split()))
        elif command == "/base":
            self._use(None)
        elif command == "/new":
            new = self._runtime.session(self._adapters)
            self._sessions[repr(self._adapters)].close()
            self._sessions[repr(self._adapters)] = new
        elif command == "/help":
            self._say(CHAT_HELP)
        else:
            self._say(f"{PROGRAM}: no command {command!r}; /help lists the commands")

    def _use(self, adapters: str | dict[str, float] | None) -> None:
        """Continue with these adapters; those that cannot answer are an error, which changes nothing."""
        # Not by name, which is that of the adapter alone for a scale of 1, whatever its own scale is.
        if repr(adapters) not in self._sessions:
            self._sessions[repr(adapters)] = self._runtime.session(adapters)
        self._adapters = adapters

    def _answer(self, text: str) -> None:
        with self._sessions[repr(self._adapters)].stream(text, **self._sampling) as stream:
            try:
                show(stream, as_json=self._as_json)
            except KeyboardInterrupt:
                print()

    def _say(self, text: str) -> None:
        # Standard output is reserved for answers.
        print(text, file=sys.stderr)


def show(stream: Stream, *, as_json: bool) -> None:
    """Print an answer: its text as it is generated and a line per tool call, or one JSON object with the timings."""
    for piece in stream:
        if not as_json:
            print(piece, end="", flush=True)
    answer = stream.answer
    assert answer is not None
    if as_json:
        print(json.dumps(_fields_of(answer), ensure_ascii=False), flush=True)
        return
    calls = [json.dumps(_call_fields(call), ensure_ascii=False) for call in answer.tool_calls]
    print("\n".join(["", *calls] if answer.content and calls else calls), flush=True)
    if answer.is_unsure:
        say_unsure(answer.confidence, answer.instead)


def say_unsure(confidence: float | None, instead: str | None = None) -> None:
    """Say on standard error that an answer is unsure, and what answered in its place, if anything."""
    sureness = "unknown" if confidence is None else f"{confidence:.2f}"
    print(f"unsure: confidence {sureness}{'' if instead is None else f', instead: {instead}'}", file=sys.stderr)


def _call_fields(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments, "id": call.id}


def _fields_of(answer: Answer) -> dict[str, Any]:
    fields: dict[str, Any] = {"text": answer.text, "tokens": answer.tokens, "stop_reason": answer.stop_reason}
    fields |= {"confidence": answer.confidence, "kind": answer.kind}
    fields |= {"is_unsure": answer.is_unsure, "instead": answer.instead}
    if answer.output is not None:
        with suppress(VerificationError):
            fields["parsed"] = answer.parsed
        fields.setdefault("parsed", None)
    if answer.logprobs is not None:
        fields["logprobs"] = [_logprob_fields(one) for one in answer.logprobs]
    if answer.route is not None:
        fields["route"] = asdict(answer.route)
    fields["tool_calls"] = [_call_fields(call) for call in answer.tool_calls]
    if answer.tool_calls:
        fields["content"] = answer.content
    return fields | asdict(answer.timings)


def _logprob_fields(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token": each.token, "text": each.text, "logprob": each.logprob} for each in one.top]
    return {"token": one.token, "text": one.text, "bytes": list(one.bytes), "logprob": one.logprob, "top": top}


def adapter_choice(runtime: Runtime, choices: Sequence[str]) -> str | dict[str, float] | None:
    """The adapters of `--adapter` or `/use`: None, a single name, `auto`, or a mapping of names to scales."""
    if list(choices) == [AUTO]:
        return AUTO
    scales: dict[str, float] = {}
    for choice in choices:
        name, equals, scale = choice.partition("=")
        if name in scales:
            raise UsageError(f"adapter {name!r} is given twice", "leave one out")
        try:
            scales[name] = float(scale) if equals else runtime.manifest.adapter(name).scale
        except ValueError as error:
            message = f"scale {scale!r} of adapter {name!r} is not a number"
            raise UsageError(message, "give NAME or NAME=SCALE") from error
    if len(choices) == 1 and "=" not in choices[0]:
        return choices[0]
    return scales or None
