"""Estimates the tokens of rows where the base's tokenizer is not at hand."""

from __future__ import annotations

import math
import re

from .data import TaskRow, text_of_turn

_TOOLS_TOKENS = 64
"""What is written around the definitions of tools: see `edgetune_runtime.tools.prompts`."""
_IN_NUMBERS, _SIGN = re.compile(r"[ -/:-@]?[0-9]"), re.compile(r"[!-/:-@\[-`{-~]")
"""Digits with the sign or space before them, of which many tokenizers make a token each, and other signs."""
_PER_TOKEN, _SIGNS_PER_TOKEN = 3, 1.5
"""Letters and spaces in ASCII per token, and signs as in JSON, low estimates."""
_JOINED = re.compile(
    r"[\u0370-\u052f\u0590-\u06ff\u0900-\u097f\u0b80-\u0bff\u0e00-\u0e7f\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]+"
)
_JOINED_PER_TOKEN = 1.5
"""Scripts of which SmolLM2's tokenizer joins bytes, and bytes per token: 1.6 of Thai and Chinese, and 2.1 of Russian.

Most bytes of others, such as Korean and Amharic, are a token each.
"""


def estimated_tokens(row: TaskRow, system: str | None) -> int:
    """A high estimate of a row's tokens with a system prompt, without those of the chat template."""
    turns = row.turns if row.system is None else row.turns[1:]
    texts = [row.text or "", *map(text_of_turn, turns)]
    return beginning_tokens(row, system) + math.ceil(sum(map(_tokens, texts)))


def beginning(row: TaskRow, system: str | None) -> str:
    """The definitions of a row's tools, and its system prompt or else `system`."""
    own = system or "" if row.system is None else row.system
    return f"{own}{'' if row.tools is None else row.tools.text}"


def beginning_tokens(row: TaskRow, system: str | None) -> int:
    """A high estimate of the tokens of a row's `beginning`."""
    return math.ceil(_tokens(beginning(row, system))) + _TOOLS_TOKENS * (row.tools is not None)


def _tokens(text: str) -> float:
    numbers, rest = sum(map(len, _IN_NUMBERS.findall(text))), _IN_NUMBERS.sub("", text)
    signs, plain = len(_SIGN.findall(rest)), len(rest.encode("ascii", "ignore"))
    joined = len("".join(_JOINED.findall(rest)).encode())
    others = len(rest.encode(errors="replace")) - plain - joined
    ascii_tokens = numbers + signs / _SIGNS_PER_TOKEN + (plain - signs) / _PER_TOKEN
    return ascii_tokens + joined / _JOINED_PER_TOKEN + others
