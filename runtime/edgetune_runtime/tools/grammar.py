"""The grammar of answers with tools: text, calls in the template's format, or both, for llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune_runtime.decoding.output import SPACINGS, OutputSpec
from edgetune_runtime.decoding.schema import closed
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.states.cache import common_prefix

from . import escaped
from .definitions import Tool, ToolSet, naming_parameters
from .formats import CallFormat, Placeholder

_NAMED = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,60}\]")
_ID = "/[A-Za-z0-9]{9}/"


def control_tokens(form: CallFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """The control tokens in a format, which have no text of their own, by their names."""
    literals = [form.begin, form.between or "", form.end, *(part for part in form.parts if isinstance(part, str))]
    literals.append(escaped.MARKS.get(form.spacing, ""))
    tokens = {}
    for name in _NAMED.findall("\n".join(literals)):
        ids = tokenizer.tokenize(name, continues=True)
        if len(ids) == 1 and not tokenizer.piece(ids[0]):
            tokens[name] = ids[0]
    return tokens


def written_form(form: CallFormat, controls: Mapping[str, int], tokenizer: Tokenizer) -> CallFormat:
    """The format as answers have it.

    It lacks a token at its end with which answers end (Gemma 4). A vocabulary of SentencePiece begins each text after a
    control token with a space; in prompts the tokenizer adds that space.
    """
    *_, last = _NAMED.findall(form.end) or [""]
    ids = tokenizer.tokenize(last, continues=True) if last and form.end.endswith(last) else []
    if len(ids) == 1 and tokenizer.is_end(ids[0]):
        form = replace(form, end=form.end.removesuffix(last))
    for name, token in controls.items():
        tokens = tokenizer.tokenize(f"{name}[", continues=True)
        if tokens[:1] == [token] and b"".join(map(tokenizer.piece, tokens)).startswith(b" "):
            return form.with_spaces(controls)
    return form


def grammar_of(tools: ToolSet, form: CallFormat, controls: Mapping[str, int], output: OutputSpec | None) -> OutputSpec:
    """What an answer may be with these tools.

    With the choice `auto` any text, and from where a call begins only calls; with `required` calls; with a tool's name
    one call of it; with `none` text in which no call begins. With `output`, a schema, what is not a call is JSON.
    """
    if output is not None and tools.choice == "none":
        return output
    return OutputSpec("grammar", _Writer(form, controls).lark(tools, output))


class _Writer:
    """Writes the rules of one format."""

    def __init__(self, form: CallFormat, controls: Mapping[str, int]) -> None:
        self._form = form
        self._controls = controls

    def lark(self, tools: ToolSet, output: OutputSpec | None) -> str:
        if tools.choice == "none":
            return "\n".join(["start: TEXT?", self._text()])
        if tools.choice == "auto" and output is not None:
            return "\n".join(self._calls_or_json(tools.offered, output))
        rules = self._calls(tools.offered, many=tools.choice in ("auto", "required"))
        if tools.choice == "auto":
            return "\n".join([*self._text_or_calls(), self._text(), *rules])
        return "\n".join([f"start: {self._literal(self._form.begin)} calls", *rules])

    def _calls_or_json(self, tools: tuple[Tool, ...], output: OutputSpec) -> list[str]:
        schema = closed(json.loads(output.text))
        if self._form.marker:
            start = f"start: {self._literal(self._form.begin)} calls | answer"
            return [start, _json("answer", schema, output.spacing), *self._calls(tools, many=True)]
        # llguidance cannot tell the text that begins a call from JSON, so calls are JSON here too.
        calls = {f"call_{number}": self._call_schema(tool) for number, tool in enumerate(tools)}
        rules = [_json(name, each, self._form.spacing) for name, each in {"answer": schema, **calls}.items()]
        return [f"start: {' | '.join(['answer', *calls])}", *rules]

    def _call_schema(self, tool: Tool) -> dict[str, Any]:
        """The schema of a call that is JSON as a whole; UsageError if the format has no such calls."""
        arguments = object()
        try:
            text = self._form.write([{"name": tool.name, "arguments": {}}])
            call = json.loads(text, object_hook=lambda value: value or arguments)
        except ValueError:
            call = None
        if not isinstance(call, dict) or arguments not in call.values():
            message = "tools and schema are both given, which the format of calls in the base's chat template excludes"
            raise UsageError(message, "give one of them")
        properties = {key: tool.schema if value is arguments else {"const": value} for key, value in call.items()}
        # References begin at the root.
        shared_parts = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
        fixed = {"type": "object", "required": [*call], "additionalProperties": False}
        return {**fixed, "properties": properties, **shared_parts}

    def _text_or_calls(self) -> list[str]:
        begin, marker = self._form.begin, self._form.marker
        if not marker:
            return [f"start: TEXT? | {self._literal(begin)} calls"]
        rest = self._literal(begin.lstrip().removeprefix(marker))
        if marker in self._controls:
            return [f"start: TEXT? ({self._piece(marker)} {rest} calls)?"]
        # The shortest text that ends with the marker, so that nothing but a call can follow it.
        return [f"start: TEXT? | head {rest} calls", rf"head[lazy]: /(.|\n)*{_escaped(marker)}/"]

    def _text(self) -> str:
        """The terminal of texts, not empty, in which no call begins."""
        if not self._form.marker:
            return rf"TEXT: /[^{_escaped(self._form.begin[0])}](.|\n)*/"
        # Also where the marker is a control token: its name in letters would be read as the token.
        return rf"TEXT: /(.|\n)+/ & ~/(.|\n)*{_escaped(self._form.marker)}(.|\n)*/"

    def _calls(self, tools: tuple[Tool, ...], *, many: bool) -> list[str]:
        form = self._form
        names = [f"call_{number}" for number in range(len(tools))]
        rules = [f"call: {' | '.join(names)}"]
        for name, tool in zip(names, tools, strict=True):
            rules += self._rules(name, tool)
        if form.between is None or not many:
            return [f"calls: call {self._literal(form.end)}", *rules]
        # What the text between calls and that after the last have in common decides nothing.
        same = common_prefix(form.between, form.end)
        common, between, end = map(self._literal, (form.end[:same], form.between[same:], form.end[same:]))
        return [f"calls: call {common} ({between} call {common})* {end}", *rules]

    def _rules(self, name: str, tool: Tool) -> list[str]:
        texts: list[str] = []
        rules = []
        for part in self._form.parts:
            if part is Placeholder.NAME:
                texts.append(self._literal(tool.name))
            elif part is Placeholder.ID:
                texts.append(_ID)
            elif part is Placeholder.ARGUMENTS:
                texts.append(f"{name}_arguments")
                rules += self._arguments(f"{name}_arguments", tool)
            else:
                texts.append(self._literal(str(part)))
        return [f"{name}: {' '.join(texts)}", *rules]

    def _arguments(self, name: str, tool: Tool) -> list[str]:
        mark = escaped.MARKS.get(self._form.spacing)
        if mark is None:
            return [_json(name, tool.schema, self._form.spacing)]
        with naming_parameters(tool.name):
            return escaped.rules(name, tool.schema, mark, self._literal)

    def _literal(self, text: str) -> str:
        """The text for a rule, its control tokens by their numbers."""
        names = "|".join(map(re.escape, self._controls))
        pieces = re.split(f"({names})", text) if names else [text]
        return " ".join(map(self._piece, filter(None, pieces)))

    def _piece(self, text: str) -> str:
        return f"<[{self._controls[text]}]>" if text in self._controls else json.dumps(text, ensure_ascii=False)


def _json(name: str, schema: Mapping[str, Any], spacing: str) -> str:
    """A rule of JSON that fits a schema."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': SPACINGS[spacing]}, ensure_ascii=False)}"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
