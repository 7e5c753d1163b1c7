"""Writes commands that a user can copy into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path


def command_line(*words: object) -> str:
    """The words, quoted for a shell where it needs that; a path is not taken for an option."""
    return shlex.join(map(_argument, words))


def _argument(value: object) -> str:
    text = str(value)
    return f"./{text}" if isinstance(value, Path) and text.startswith("-") else text
