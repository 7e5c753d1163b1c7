"""Compares the errors that docs/how-to/when-something-fails.md quotes with the texts in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
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


def templates() -> Iterator[tuple[str | None, ...]]:
    """The parts of each string of the source; None is a value in braces, which is any text."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts: list[str | None]
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    # Such as "ssh was refused by {host}", which is filled in with `format`.
                    parts = [text if number % 2 == 0 else None for number, text in enumerate(split(node.value))]
                else:
                    continue
                if len(re.findall("[a-z]", "".join(part or "" for part in parts))) >= FEWEST_LETTERS:
                    yield tuple(parts)


def split(text: str) -> list[str]:
    return re.split(r"\{(\w*)\}", text)


@pytest.fixture(scope="module")
def sources() -> set[tuple[str | None, ...]]:
    return set(templates())


@cache
def pattern(parts: tuple[str | None, ...]) -> re.Pattern[str]:
    return re.compile("".join(".+?" if part is None else re.escape(part) for part in parts) + "(?=$|[;:] )")


def is_printed(text: str, sources: set[tuple[str | None, ...]]) -> bool:
    """Whether `text` is texts of the source, one after the other; after each, a value up to the next semicolon."""
    if not text:
        return True
    # A pattern takes a hundred times as long to compile as to look for its parts.
    likely = [parts for parts in sources if all(part is None or part in text for part in parts)]
    rests = {text[match.end() :].lstrip(";: ") for parts in likely if (match := pattern(parts).match(text))}
    after_values = {rest.partition("; ")[2] for rest in rests if "; " in rest}
    return any(is_printed(rest, sources) for rest in rests | after_values)


def test_the_errors_that_the_page_quotes_are_in_the_source(sources: set[tuple[str | None, ...]]) -> None:
    messages = [re.sub(r"^edgetune(-run)?: ", "", line) for line in quoted()]
    assert len(messages) > 20
    # Some errors about a board get its name where they are printed.
    assert [
        text
        for text in messages
        if not is_printed(text, sources) and not is_printed(text.removeprefix("pi@kitchen: "), sources)
    ] == []


def test_an_error_that_nothing_prints_is_found(sources: set[tuple[str | None, ...]]) -> None:
    (line, *_) = (line for line in quoted() if "does not match its digest" in line)
    assert is_printed(line.removeprefix("edgetune-run: "), sources)
    assert not is_printed(line.removeprefix("edgetune-run: ").replace("digest", "checksum"), sources)
