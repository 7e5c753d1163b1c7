"""`edgetune init`: writes a recipe for data files, or an example with its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from edgetune_runtime.errors import UsageError

from .arguments import base_option, data_option, output_option

DEFAULT_RECIPE = Path("recipe.yaml")


def init(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="The recipe to write (default: recipe.yaml), and more data files."),
    ] = None,
    *,
    data: Annotated[
        list[Path] | None, data_option(metavar="FILE", help="Your rows, a .jsonl, .csv or .tsv file per task.")
    ] = None,
    base: Annotated[str | None, base_option(metavar="BASE", help="The base model (default: smollm2-135m).")] = None,
    force: Annotated[bool, output_option("--force", help="Replace the recipe if there is one.")] = False,
) -> None:
    """Write a recipe for your data, with the reason for each setting.

    Reads at most 8 MB of each file. NAME-validation and NAME-test belong to the task of NAME-train or NAME. Without
    data, writes an example recipe and its data.
    """
    from edgetune.proposal.files import is_data
    from edgetune.proposal.writing import write_recipe

    files = [*(data or ()), *(path for path in paths or () if is_data(path))]
    if base is not None and not files:
        raise UsageError("--base is only for a recipe of your data", "give data too: --data FILE")
    target = _target([path for path in paths or () if not is_data(path)])
    if target.exists() and not force:
        raise UsageError(
            f"{target} already exists", "choose another file" + ", or replace it with --force" * bool(files)
        )
    write_recipe(target, files, base)
    print(target)


def _target(paths: Sequence[Path]) -> Path:
    """The recipe to write, of the paths that name no data file."""
    if len(paths) > 1:
        raise UsageError(f"{paths[1]} is not a data file", "give one recipe to write, and data as .jsonl, .csv or .tsv")
    path = paths[0] if paths else DEFAULT_RECIPE
    return path / DEFAULT_RECIPE if path.is_dir() else path
