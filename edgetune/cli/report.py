"""`edgetune report BUNDLE`: one HTML page about how a bundle was trained and checked, and on which boards it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import OUTPUT_PANEL, pairs_of


def report(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    *,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The HTML file to write.", rich_help_panel=OUTPUT_PANEL)
    ] = Path("report.html"),
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--score", metavar="NAME=FILE", help="An adapter's score, from `edgetune evaluate --json`; repeatable."
        ),
    ] = None,
) -> None:
    """Write an HTML report on a bundle.

    The report is one file without scripts or links: methods, data, losses, scores, parity, sizes, and the boards that
    the bundle fits on.
    """
    from edgetune_runtime.atomic import replacing  # noqa: PLC0415 - help needs none of it
    from edgetune_runtime.bundle import read_manifest  # noqa: PLC0415

    from edgetune.report.facts import facts_of, fits_of, scores_of  # noqa: PLC0415
    from edgetune.report.render import page  # noqa: PLC0415

    manifest = read_manifest(bundle)
    files = pairs_of(scores or (), "--score", "NAME=FILE")
    facts = facts_of(bundle, manifest, scores_of((name, Path(file)) for name, file in files.items()))
    with replacing(out) as temporary:
        temporary.write_text(page(facts, fits_of(bundle, manifest)), encoding="utf-8")
    print(out)
