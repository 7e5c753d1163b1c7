"""`edgetune report BUNDLE`: one HTML page about the training, the answers and the boards of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import BundlePath, Quiet, check_page, data_option, output_option, pairs_of


def report(
    bundle: BundlePath,
    *,
    out: Annotated[Path, output_option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    recipe: Annotated[
        Path | None, data_option(metavar="RECIPE", help="The bundle's recipe: answer validation rows of it.")
    ] = None,
    data: Annotated[
        list[str] | None, data_option(metavar="NAME=FILE", help="Rows for an adapter to answer instead; repeatable.")
    ] = None,
    limit: Annotated[int, data_option(min=1, metavar="N", help="Answer at most N rows per adapter.")] = 40,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--score", metavar="NAME=FILE", help="An adapter's score, from `edgetune evaluate --json`; repeatable."
        ),
    ] = None,
    compared: Annotated[
        list[Path] | None,
        data_option(
            "--compare",
            metavar="DIR",
            help="Show the learning curve of `edgetune compare --rows --out DIR`; repeatable.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write an HTML report on a bundle.

    The report is one file without scripts or links: methods, data, loss curves, right and wrong answers, scores,
    parity, sizes, how well the confidence is calibrated, and the boards that the bundle fits on. Answers need --recipe
    or --data.
    """
    from edgetune_runtime.bundle import read_manifest

    from edgetune.common.files import write_file
    from edgetune.common.progress import Progress
    from edgetune.report.answers import score_adapters
    from edgetune.report.facts import facts_of, fits_of, scores_of
    from edgetune.report.learning_curve import learning_curve_of
    from edgetune.report.render import page

    manifest = read_manifest(bundle)
    check_page(out, bundle)
    scored = pairs_of(scores or (), "--score", "NAME=FILE")
    files = pairs_of(data or (), "--data", "NAME=FILE")
    results = scores_of((name, Path(file)) for name, file in scored.items())
    learning = list(map(learning_curve_of, compared or ()))
    for name in (*results, *files, *(curve.task for curve in learning)):
        manifest.adapter(name)
    results |= score_adapters(bundle, manifest, recipe, files, limit=limit, progress=Progress(quiet=quiet))
    facts = facts_of(bundle, manifest, results)
    write_file(out, page(facts, fits_of(bundle, manifest), learning))
    print(out)
