"""The format in which a chat template writes tool calls, found by rendering a conversation with one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any

from edgetune_runtime.errors import UsageError
from edgetune_runtime.states.cache import common_prefix
from edgetune_runtime.text.chat import Message, render

from . import escaped

SEPARATORS = {"spaced": (", ", ": "), "compact": (",", ":")}
"""What stands between the items and after the keys of JSON, as `decoding.output.SPACINGS` names it."""


class Placeholder(Enum):
    """A part of a call that differs from call to call."""

    NAME = "name"
    ARGUMENTS = "arguments"
    ID = "id"


Part = str | Placeholder

_MARKER = re.compile(r"\s*(<[^<>\s]{1,60}>|\[[A-Z_]{2,60}\])")
_NAMES = ("edgetune_probe", "edgetune_other")
_IDS = ("probe0001", "probe0002")
_ARGUMENTS = {"edgetune_key": "edgetune_value", "edgetune_number": 7}
_FIRST_CALL = {"name": _NAMES[0], "arguments": _ARGUMENTS, "id": _IDS[0]}
_ANSWER = "edgetune_answer"
_ASK = {"role": "user", "content": "edgetune_question"}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "edgetune_description",
            "parameters": {"type": "object", "properties": {"edgetune_key": {"type": "string"}}},
        },
    }
    for name in _NAMES
]


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: `begin`, the parts of each call with `between` them, `end`.

    `between` is None where a message has one call at most. `spacing` is that of the arguments' JSON, a key of
    SEPARATORS, or a key of `escaped.MARKS`.
    """

    begin: str
    parts: tuple[Part, ...]
    between: str | None
    end: str
    spacing: str = "spaced"

    @property
    def marker(self) -> str:
        """The text that begins calls wherever it occurs; '' where calls begin with JSON, the answer's first."""
        match = _MARKER.match(self.begin)
        return match[1] if match else ""

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """The text of calls, each with `name`, `arguments` and maybe `id`."""

        def part_of(part: Part, call: Mapping[str, Any]) -> str:
            if isinstance(part, str):
                return part
            value = call.get(part.value, "")
            return value if isinstance(value, str) else _arguments(value, self.spacing)

        texts = ["".join(part_of(part, call) for part in self.parts) for call in calls]
        if self.between is None:
            return "\n".join(f"{self.begin}{text}{self.end}" for text in texts)
        return f"{self.begin}{self.between.join(texts)}{self.end}"

    def with_spaces(self, controls: Collection[str]) -> CallFormat:
        """The format with a space after each of these control tokens that text follows, as SentencePiece writes it."""
        if not controls:
            return self
        names = "|".join(map(re.escape, controls))
        within, after = re.compile(f"({names})(?!{names}|$)"), re.compile(f"({names})(?!{names})")

        def spaced(text: str) -> str:
            return after.sub(r"\1 ", text)

        parts = tuple(spaced(part) if isinstance(part, str) else part for part in self.parts)
        between = None if self.between is None else spaced(self.between)
        return replace(self, begin=spaced(self.begin), parts=parts, between=between, end=within.sub(r"\1 ", self.end))


@dataclass(frozen=True)
class TemplateTools:
    """What a chat template does with tools by itself, and the format of its calls."""

    renders_tools: bool
    renders_calls: bool
    renders_results: bool
    format: CallFormat


_CALL: tuple[Part, ...] = (Placeholder.NAME, '", "arguments": ', Placeholder.ARGUMENTS)
HERMES = CallFormat('<tool_call>\n{"name": "', _CALL, '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>")
"""The format of Hermes and Qwen, also for templates that do not know tools."""
_MENTIONED = {
    "<|tool_call|>": CallFormat('<|tool_call|>[{"name": "', _CALL, '}, {"name": "', "}]"),
    "<tool_call>": HERMES,
}
"""The formats of templates that only describe calls: Granite 3's, and SmolLM3's."""


@lru_cache(maxsize=16)
def template_tools(template: str | None, bos: str, eos: str) -> TemplateTools:
    """What this chat template does with tools; IncompatibleError if it is invalid or exceeds a limit.

    A template that renders the tools but neither renders nor names a format that is known here counts as one that does
    not know tools: its messages get the tools and calls as text in the format HERMES.
    """
    unknown = TemplateTools(False, False, False, HERMES)
    if template is None:
        return unknown
    probe = _Probe(template, bos, eos)
    rendered = probe.format()
    shows_tools = all(word in probe.text([_ASK], prompt=True) for word in (*_NAMES, "edgetune_key"))
    mentioned = next((form for mark, form in _MENTIONED.items() if mark in template), None)
    form = rendered or mentioned
    if form is None or not (shows_tools or rendered):
        return unknown
    called = probe.called(1) if rendered else {"role": "assistant", "content": form.write([_FIRST_CALL])}
    result = {"role": "tool", "name": _NAMES[0], "tool_call_id": _IDS[0], "content": "edgetune_result"}
    shows_results = "edgetune_result" in probe.text([_ASK, called, result], prompt=True)
    return TemplateTools(shows_tools, rendered is not None, shows_results, form)


@dataclass(frozen=True)
class _Probe:
    """Renders probe conversations with a template."""

    template: str
    bos: str
    eos: str

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The rendered messages; '' if the template refuses them. IncompatibleError if it cannot be rendered."""
        bos, eos = self.bos, self.eos
        try:
            return render(self.template, messages, add_generation_prompt=prompt, bos=bos, eos=eos, tools=_TOOLS)
        except UsageError:
            return ""

    def called(self, count: int) -> Message:
        """An assistant's message with `count` calls."""
        calls = [
            {"id": _IDS[n], "type": "function", "function": {"name": _NAMES[n], "arguments": _ARGUMENTS}}
            for n in range(count)
        ]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def format(self) -> CallFormat | None:
        """The format of calls, from what stands where an answer's text would; None if none is found."""
        one, two = self._body(1), self._body(2)
        for spacing in (*SEPARATORS, *escaped.MARKS):
            arguments = _arguments(_ARGUMENTS, spacing)
            first = _cut(one, 0, arguments)
            if first is None or not first[0].strip():
                continue
            begin, parts, end = first
            form = CallFormat(begin, parts, None, end, spacing)
            second = _cut(two.removeprefix(begin), 1, arguments)
            first_call = CallFormat("", parts, None, "", spacing).write([_FIRST_CALL])
            if second is not None and second[0].startswith(first_call):
                form = replace(form, between=second[0].removeprefix(first_call))
            return form
        return None

    def _body(self, calls: int) -> str:
        """What the template writes for calls, without what it also writes before and after a text."""
        text = self.text([_ASK, self.called(calls)])
        plain = self.text([_ASK, {"role": "assistant", "content": _ANSWER}])
        before, answer, after = plain.rpartition(_ANSWER)
        if not text or not answer:
            return ""
        start = common_prefix(text, before)
        rest = text[start:]
        tail = common_prefix(rest[::-1], after[::-1])
        return rest[: len(rest) - tail]


def _arguments(value: object, spacing: str) -> str:
    """The text of arguments."""
    if spacing in escaped.MARKS:
        return escaped.write(value, escaped.MARKS[spacing])
    return json.dumps(value, ensure_ascii=False, separators=SEPARATORS[spacing])


def _cut(body: str, number: int, arguments: str) -> tuple[str, tuple[Part, ...], str] | None:
    """What is before a probe's call, its parts, and what is after it; None if name or arguments are missing."""
    values = {Placeholder.NAME: _NAMES[number], Placeholder.ARGUMENTS: arguments, Placeholder.ID: _IDS[number]}
    name = body.find(values[Placeholder.NAME])
    # With two calls, the arguments of the second are those after its name.
    places = {
        Placeholder.NAME: name,
        Placeholder.ARGUMENTS: body.find(arguments, name),
        Placeholder.ID: body.find(values[Placeholder.ID]),
    }
    if places[Placeholder.NAME] < 0 or places[Placeholder.ARGUMENTS] < 0:
        return None
    ordered = sorted((place, placeholder.value) for placeholder, place in places.items() if place >= 0)
    parts: list[Part] = []
    start = at = ordered[0][0]
    for place, value in ordered:
        placeholder = Placeholder(value)
        parts += [body[at:place], placeholder] if place > at else [placeholder]
        at = place + len(values[placeholder])
    return body[:start], tuple(parts), body[at:]
