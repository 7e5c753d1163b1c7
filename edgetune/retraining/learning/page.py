"""Renders two bundles compared as one HTML page: scores and figures of both, and the rows with another answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgetune.common.templates import template_of

from .change import Change, ChangedAnswer, Changes
from .learn import Learned

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SHOWN = 60
"""Answers of each kind on the page."""


def page_of(name: str, result: Learned) -> str:
    """The page of a bundle that learned."""
    worse = ", ".join(result.worse)
    verdict = f"Nothing was packed: {worse} got worse by more than one standard error."
    if result.bundle is not None:
        verdict = f"Packed as {result.bundle}: no adapter got worse by more than one standard error."
    about = {
        adapter: f"Trained again with {count} corrections. Both bundles answered the old validation rows, and "
        "corrections that were held out."
        for adapter, count in result.learned.items()
    }
    return page_of_changes(f"What {name} learned", verdict, result.changes, about, command="learn")


def page_of_changes(
    title: str,
    verdict: str,
    changes: Changes,
    about: Mapping[str, str],
    *,
    command: str,
    figures: Sequence[Sequence[str]] = (),
    margin: float = 1.0,
) -> str:
    """A page that needs neither a network nor a script.

    `about` is a sentence per adapter, `figures` a table of both bundles with its titles as the first row; `command` is
    the one whose `--json` lists all answers.
    """
    groups = {adapter: {kind: _groups(change) for kind, change in sets.items()} for adapter, sets in changes.items()}
    return template_of(TEMPLATE).render(
        title=title,
        verdict=verdict,
        changes=changes,
        about=about,
        command=command,
        figures=figures,
        margin=margin,
        groups=groups,
        shown=SHOWN,
    )


def _groups(change: Change) -> list[tuple[str, str, list[ChangedAnswer]]]:
    """The title, the style and the answers of each kind that there is: better, worse, equal, and still wrong ones."""
    kinds = (
        ("Better answers", "good", [answer for answer in change.answers if answer.gain > 0]),
        ("Worse answers", "bad", [answer for answer in change.answers if answer.gain < 0]),
        ("Other answers with the same score", "", [answer for answer in change.answers if answer.gain == 0]),
        ("The same wrong answer as before", "bad", list(change.still_wrong)),
    )
    return [kind for kind in kinds if kind[2]]
