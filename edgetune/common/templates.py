"""Reads jinja2 templates, in which undefined names are errors and lines of tags leave no blank lines; writes pages."""

from __future__ import annotations

from pathlib import Path

from edgetune_runtime.formats.atomic import replacing
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_STYLE = Path(__file__).with_name("page.css")


def environment_of(folder: Path, *, autoescape: bool = True) -> Environment:
    """The environment for the templates in a folder; without `autoescape`, their values are not made safe for HTML.

    `style` is the style sheet of pages.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["style"] = Markup(_STYLE.read_text(encoding="utf-8"))
    return environment


def write_page(path: Path, page: str) -> None:
    """Write a page, and make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
