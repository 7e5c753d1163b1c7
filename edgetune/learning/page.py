"""Renders what learning changed as one HTML page: the scores of both bundles, and the rows with another answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgetune.templates import environment_of

from .change import ChangedAnswer
from .learn import Learned

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SHOWN = 60
"""Answers of each kind on the page."""


def page_of(name: str, result: Learned) -> str:
    """The page of a bundle that learned, which needs neither a network nor a script."""
    template = environment_of(TEMPLATE.parent).get_template(TEMPLATE.name)
    groups = {
        adapter: {kind: _groups(change.answers) for kind, change in sets.items()}
        for adapter, sets in result.changes.items()
    }
    return template.render(name=name, result=result, groups=groups, shown=SHOWN)


def _groups(answers: Sequence[ChangedAnswer]) -> list[tuple[str, str, list[ChangedAnswer]]]:
    """The title, the style and the answers of each kind that there is: better, worse, and equally good ones."""
    kinds = (
        ("Better answers", "good", [answer for answer in answers if answer.gain > 0]),
        ("Worse answers", "bad", [answer for answer in answers if answer.gain < 0]),
        ("Other answers with the same score", "", [answer for answer in answers if answer.gain == 0]),
    )
    return [kind for kind in kinds if kind[2]]
