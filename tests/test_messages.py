"""Compares the errors that docs/how-to/when-something-fails.md quotes with the texts in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/how-to/when-something-fails.md"
FOLDERS = ("edgetune", "devices", "export", "runtime", "tools")
# Fewer letters match by chance.
FEWEST_LETTERS = 8


def quoted() -> list[str]:
    """The lines of the page's text blocks."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def templates() -> Iterator[str]:
    """A pattern for each string of the source, in which a value in braces is any text."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    # Such as "ssh was refused by {host}", which is filled in with `format`.
                    parts = [text if number % 2 == 0 else None for number, text in enumerate(split(node.value))]
                else:
                    continue
                if len(re.findall("[a-z]", "".join(part or "" for part in parts))) >= FEWEST_LETTERS:
                    yield "".join(".+?" if part is None else re.escape(part) for part in parts)


def split(text: str) -> list[str]:
    return re.split(r"\{(\w*)\}", text)


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    return [re.compile(f"{template}(?=$|[;:] )") for template in set(templates())]


def is_printed(text: str, patterns: list[re.Pattern[str]]) -> bool:
    """Whether `text` is texts of the source, one after the other; after each, a value up to the next semicolon."""
    if not text:
        return True
    rests = {text[match.end() :].lstrip(";: ") for pattern in patterns if (match := pattern.match(text))}
    after_values = {rest.partition("; ")[2] for rest in rests if "; " in rest}
    return any(is_printed(rest, patterns) for rest in rests | after_values)


@pytest.mark.parametrize("line", quoted())
def test_an_error_that_the_page_quotes_is_in_the_source(line: str, patterns: list[re.Pattern[str]]) -> None:
    message = re.sub(r"^edgetune(-run)?: ", "", line)
    # Some errors about a board get its name where they are printed.
    assert any(is_printed(text, patterns) for text in (message, message.removeprefix("pi@kitchen: ")))


def test_an_error_that_nothing_prints_is_found(patterns: list[re.Pattern[str]]) -> None:
    (line, *_) = (line for line in quoted() if "does not match its digest" in line)
    assert is_printed(line.removeprefix("edgetune-run: "), patterns)
    assert not is_printed(line.removeprefix("edgetune-run: ").replace("digest", "checksum"), patterns)
