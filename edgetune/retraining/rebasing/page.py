"""Renders a bundle on two bases as one HTML page, and makes the table of their figures."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.retraining.learning.page import page_of_changes

from .rebase import Rebased


def page_of(name: str, result: Rebased) -> str:
    """The page of the bundle `name`."""
    if result.bundle is None:
        verdict = f"Nothing was packed: {', '.join(result.worse)} got worse by more than {_limit(result)}."
    elif result.left_out:
        verdict = f"Packed as {result.bundle} without {', '.join(result.left_out)}, which got worse."
    else:
        verdict = f"Packed as {result.bundle}: no adapter got worse by more than {_limit(result)}."
    about = dict.fromkeys(result.changes, "Trained again with the same recipe. Both bundles answered these rows.")
    title = f"{name} on {result.after.base}"
    figures = figure_rows(result)
    return page_of_changes(
        title, verdict, result.changes, about, command="rebase", figures=figures, margin=result.margin
    )


def figure_rows(result: Rebased) -> list[Sequence[str]]:
    """The table of both bundles, with its titles as the first row; sizes in MB, 10^6 bytes."""
    both = (result.before, result.after)
    rows: list[Sequence[str]] = [
        ("", "before", "after"),
        ("base", *(each.base for each in both)),
        ("quantization", *(each.quantization for each in both)),
        ("parameters", *(f"{each.parameters / 1e6:,.1f} million" for each in both)),
        ("MB of the base", *(f"{each.base_mb:,.1f}" for each in both)),
    ]
    for name in result.changes:
        rows.append((f"MB of {name}", *(f"{each.adapters_mb[name]:,.2f}" for each in both)))
    return [*rows, ("MB of the bundle", *(f"{each.total_mb:,.1f}" for each in both))]


def _limit(result: Rebased) -> str:
    return "one standard error" if result.margin == 1 else f"{result.margin:g} standard errors"
