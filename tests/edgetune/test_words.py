"""The glossary's retired terms are used in no documentation and no help text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from edgetune_runtime.cli.main import make_parser

from edgetune.cli.main import app

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs/glossary.md"
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "runtime/README.md"}
)


def retired() -> list[str]:
    """The terms of the glossary's second table."""
    table = GLOSSARY.read_text(encoding="utf-8").partition("## Retired terms")[2]
    return [row[1] for row in re.finditer(r"^\| (.+?) \|", table, re.MULTILINE)][2:]


def helps(command: Any, name: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - click's classes have no types here
    """Name and help of a command, its options and its subcommands."""
    yield name, " ".join(filter(None, [command.help, *(getattr(option, "help", None) for option in command.params)]))
    for child, found in getattr(command, "commands", {}).items():
        yield from helps(found, f"{name} {child}")


def found_in(text: str) -> list[str]:
    flat = " ".join(text.split())
    return [term for term in retired() if re.search(rf"\b{re.escape(term)}\b", flat, re.IGNORECASE)]


def test_the_glossary_has_retired_terms() -> None:
    assert "tokens a second" in retired()
    assert found_in("It writes 20 tokens a\nsecond.") == ["tokens a second"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_uses_a_retired_term(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not found_in(text.partition("## Retired terms")[0] if page == GLOSSARY else text)


def test_no_help_text_uses_a_retired_term() -> None:
    texts = dict(helps(typer.main.get_command(app), "edgetune"))
    for parser in (runtime := make_parser(), *runtime._subparsers._group_actions[0].choices.values()):
        texts[parser.prog] = parser.format_help()
    assert {name: words for name, text in texts.items() if (words := found_in(text))} == {}
