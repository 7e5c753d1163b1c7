"""Reads jinja2 templates, in which undefined names are errors and lines of tags leave no blank lines."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

_STYLE = Path(__file__).with_name("page.css")


def template_of(path: Path, *, autoescape: bool = True) -> Template:
    """The template in a file, which may include those beside this one; without `autoescape`, its values may be HTML.

    `style` is the style sheet of pages, and the filter `number` formats a number, or writes - for none.
    """
    environment = Environment(
        loader=FileSystemLoader([path.parent, _STYLE.parent]),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["style"] = Markup(_STYLE.read_text(encoding="utf-8"))
    environment.filters["number"] = _number
    return environment.get_template(path.name)


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)
