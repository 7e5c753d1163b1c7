"""The grammar of answers with tools: text, calls in the template's format, or both, for llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from edgetune_runtime.decoding.output import SPACINGS, OutputSpec
from edgetune_runtime.engines.base import Tokenizer

from .definitions import Tool, ToolSet
from .formats import CallFormat, Hole, shared

_NAMED = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,60}\]")
_ID = "/[A-Za-z0-9]{9}/"


def control_tokens(form: CallFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """The control tokens in a format, which stand for no text of their own, by their names."""
    literals = [form.begin, form.between or "", form.end, *(part for part in form.parts if isinstance(part, str))]
    tokens = {}
    for name in _NAMED.findall("\n".join(literals)):
        found = tokenizer.tokenize(name, continues=True)
        if len(found) == 1 and not tokenizer.piece(found[0]):
            tokens[name] = found[0]
    return tokens


def written_form(form: CallFormat, controls: Mapping[str, int], tokenizer: Tokenizer) -> CallFormat:
    """The format as answers have it: a vocabulary of SentencePiece begins each text after a control token with a space.

    In prompts the tokenizer adds that space.
    """
    for name, token in controls.items():
        tokens = tokenizer.tokenize(f"{name}[", continues=True)
        if tokens[:1] == [token] and b"".join(map(tokenizer.piece, tokens)).startswith(b" "):
            return form.with_spaces(controls)
    return form


def grammar_of(tools: ToolSet, form: CallFormat, controls: Mapping[str, int]) -> OutputSpec:
    """What an answer may be with these tools.

    With the choice `auto` any text, and from where a call begins only calls; with `required` calls; with a tool's name
    one call of it; with `none` text in which no call begins.
    """
    return OutputSpec("grammar", _Writer(form, controls).lark(tools))


class _Writer:
    """Writes the rules of one format."""

    def __init__(self, form: CallFormat, controls: Mapping[str, int]) -> None:
        self._form = form
        self._controls = controls

    def lark(self, tools: ToolSet) -> str:
        if tools.choice == "none":
            return "\n".join(["start: TEXT?", self._text()])
        rules = self._calls(tools.offered, many=tools.choice in ("auto", "required"))
        if tools.choice == "auto":
            return "\n".join([*self._text_or_calls(), self._text(), *rules])
        return "\n".join([f"start: {self._literal(self._form.begin)} calls", *rules])

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
        same = shared(form.between, form.end)
        common, between, end = map(self._literal, (form.end[:same], form.between[same:], form.end[same:]))
        return [f"calls: call {common} ({between} call {common})* {end}", *rules]

    def _rules(self, name: str, tool: Tool) -> list[str]:
        texts: list[str] = []
        rules = []
        for part in self._form.parts:
            if part is Hole.NAME:
                texts.append(self._literal(tool.name))
            elif part is Hole.ID:
                texts.append(_ID)
            elif part is Hole.ARGUMENTS:
                texts.append(f"{name}_arguments")
                rules.append(f"{name}_arguments: %json {json.dumps(self._schema(tool))}")
            else:
                texts.append(self._literal(str(part)))
        return [f"{name}: {' '.join(texts)}", *rules]

    def _schema(self, tool: Tool) -> dict[str, Any]:
        return {**tool.schema, "x-guidance": SPACINGS[self._form.spacing]}

    def _literal(self, text: str) -> str:
        """The text for a rule, its control tokens by their numbers."""
        names = "|".join(map(re.escape, self._controls))
        pieces = re.split(f"({names})", text) if names else [text]
        return " ".join(map(self._piece, filter(None, pieces)))

    def _piece(self, text: str) -> str:
        return f"<[{self._controls[text]}]>" if text in self._controls else json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
