"""Matches regular expressions from files in a child process with a time limit, as some never end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from edgetune_runtime.errors import IncompatibleError

LIMIT_S = 5.0
"""Seconds for all expressions of one file."""
_PROGRAM = """
import json, re, sys
expressions, names, method = json.load(sys.stdin)
matches = []
for expression in expressions:
    try:
        match = getattr(re.compile(expression), method)
    except (re.error, RecursionError, OverflowError):
        matches.append(None)
    else:
        matches.append([number for number, name in enumerate(names) if match(name)])
json.dump(matches, sys.stdout)
"""


def of_key(key: str) -> str:
    """The expression with which PEFT matches a key of rank_pattern and alpha_pattern (peft/utils/other.py)."""
    return rf"(.*\.)?({key})$"


def matching(
    expressions: Sequence[str], names: Sequence[str], subject: str, *, whole: bool = False
) -> list[set[str] | None]:
    """The names that begin with a match of each expression, or are one; None for an invalid expression.

    IncompatibleError, which names their `subject`, after LIMIT_S.
    """
    if not expressions:
        return []
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    text = json.dumps([list(expressions), list(names), "fullmatch" if whole else "match"])
    try:
        process = subprocess.run(command, input=text, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        message = f"matching the regular expressions of {subject} takes more than {LIMIT_S:.0f} s"
        raise IncompatibleError(message, "write module names in their place") from error
    matches: list[list[int] | None] = json.loads(process.stdout)
    return [None if numbers is None else {names[number] for number in numbers} for numbers in matches]
