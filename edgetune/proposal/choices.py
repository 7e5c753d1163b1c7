"""A recipe as a list of choices, each a key with its value and the reason, and the YAML text with the reasons."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune_runtime.wording import printable
from ruamel.yaml import YAML

from edgetune.recipe.problems import json_in_yaml

_WIDTH = 100
_WORDS = re.compile(r"[^\W\d_][\w./-]*(?: [\w./-]+)*")


@dataclass(frozen=True)
class Choice:
    """The value of a dotted key of a recipe, and the reason for it, "" if it needs none."""

    key: str
    value: object
    reason: str = ""

    def under(self, section: str) -> Choice:
        """The same choice in a section of the recipe."""
        return Choice(f"{section}.{self.key}", self.value, self.reason)


def nested_values(choices: Sequence[Choice]) -> dict[str, Any]:
    """The recipe as nested values."""
    values: dict[str, Any] = {}
    for choice in choices:
        *sections, key = choice.key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = choice.value
    return values


def text_of(choices: Sequence[Choice], introduction: str) -> str:
    """The recipe as YAML, each choice below its reason; the choices of a section are next to each other."""
    lines = [f"# {line}".rstrip() for line in introduction.splitlines()]
    open_sections: list[str] = []
    for choice in choices:
        *sections, key = choice.key.split(".")
        same = next(
            (depth for depth, name in enumerate(sections) if [name] != open_sections[depth : depth + 1]), len(sections)
        )
        # A blank line before each key at the top, and between adapters.
        if not sections or same < min(len(open_sections) or 1, 2):
            lines.append("")
        lines += [f"{'  ' * depth}{_in_yaml(name)}:" for depth, name in enumerate(sections) if depth >= same]
        open_sections = sections
        indent = "  " * len(sections)
        reason = textwrap.wrap(printable(choice.reason), _WIDTH - len(indent), break_long_words=False)
        lines += [f"{indent}# {line}" for line in reason]
        lines.append(f"{indent}{key}: {_in_yaml(choice.value)}")
    return "\n".join(lines) + "\n"


def _in_yaml(value: object) -> str:
    """A value in one line. Texts are quoted as in JSON, which YAML reads, unless they are words alone."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_in_yaml(key)}: {_in_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_in_yaml, value))}]"
    if isinstance(value, str) and _WORDS.fullmatch(value) and YAML(typ="safe", pure=True).load(value) == value:
        return value
    return json_in_yaml(value)
