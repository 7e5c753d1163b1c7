"""How edgetune reads its jinja2 templates: undefined names are errors, and lines of tags leave no blank lines."""

from __future__ import annotations

from pathlib import Path

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
