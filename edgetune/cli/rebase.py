"""`edgetune rebase BUNDLE --base NEW`: the adapters of a bundle on another base, if they got no worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import VerificationError

import edgetune

from .arguments import (
    AsJson,
    BundlePath,
    Quiet,
    Settings,
    base_option,
    check_page,
    data_option,
    output_option,
    pairs_of,
    print_json,
    settings_of,
    shown_unless,
)
from .build import Converter
from .changes import print_changes
from .tables import print_table

if TYPE_CHECKING:
    from edgetune.retraining.rebasing.rebase import Rebased


def rebase(
    bundle: BundlePath,
    *,
    base: Annotated[
        str | None, base_option(metavar="NEW", help="The new base, named as in a recipe (default: the recipe's).")
    ] = None,
    quantization: Annotated[
        str | None,
        base_option(metavar="NAME", help="Its quantization (default: a .gguf file unchanged, otherwise the recipe's)."),
    ] = None,
    recipe: Annotated[
        Path | None,
        data_option(metavar="RECIPE", help="The recipe with the rows (default: beside BUNDLE, or the one in it)."),
    ] = None,
    folder: Annotated[Path, data_option(metavar="DIR", help="Where paths in the bundle's own recipe start.")] = Path(),
    data: Annotated[
        list[str] | None,
        data_option(metavar="NAME=FILE", help="Test rows of an adapter, compared too; repeatable."),
    ] = None,
    settings: Settings = None,
    margin: Annotated[
        float,
        typer.Option(min=0, metavar="N", help="How many standard errors a score may fall."),
    ] = 1.0,
    without_worse: Annotated[
        bool, typer.Option("--without-worse", help="Pack the bundle without the adapters that got worse.")
    ] = False,
    out: Annotated[
        Path | None, output_option(metavar="OUT", help="The folder of the new bundle (default: BUNDLE-rebased).")
    ] = None,
    page: Annotated[
        Path | None, output_option(metavar="FILE", help="Write an HTML page with both bundles and the changed answers.")
    ] = None,
    converter: Converter = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the adapters of a bundle again on another base.

    Trains all of them with the bundle's recipe, on the new base or on another quantization of the same one. Both
    bundles answer the validation rows, and test rows if there are any. The new bundle is packed only if no adapter got
    worse by more than one standard error, or as --margin says.
    """
    from edgetune.common.work_folder import named, rebased_folder
    from edgetune.recipe.problems import check_set_once

    changes, tests = settings_of(settings), pairs_of(data or (), "--data", "NAME=FILE")
    flags = {"base": base, "quantization": quantization}
    check_set_once(changes, {f"--{key}": [key] for key, value in flags.items() if value is not None})
    if page is not None:
        check_page(page, bundle, out or rebased_folder(bundle))
    result = edgetune.rebase(
        bundle,
        base,
        out,
        quantization=quantization,
        recipe=recipe,
        folder=folder,
        settings=changes,
        data=tests,
        margin=margin,
        without_worse=without_worse,
        converter=converter,
        on_progress=shown_unless(quiet),
    )
    if page is not None:
        from edgetune.common.files import write_file
        from edgetune.retraining.rebasing.page import page_of

        write_file(page, page_of(named(bundle).name, result))
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)
    if result.bundle is None:
        message = f"worse on the new base: {', '.join(result.worse)}; nothing was packed"
        other = "change the training with --set" if without_worse else "leave these adapters out with --without-worse"
        raise VerificationError(message, f"allow more with --margin, or {other}")


def _print(result: Rebased) -> None:
    """The scores on both bases, some answers that changed, and the figures of both bundles."""
    from edgetune.retraining.rebasing.page import figure_rows

    print_changes(result.changes)
    titles, *rows = figure_rows(result)
    print_table(titles, rows, texts=titles[:1])
    if result.left_out:
        print(f"left out, because they got worse: {', '.join(result.left_out)}")
    print("nothing packed" if result.bundle is None else f"packed {result.bundle}")
