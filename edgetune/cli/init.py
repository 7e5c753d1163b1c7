"""`edgetune init`: writes a recipe for data files, or an example with its data; also the recipe of `build FILE.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import UsageError

from .arguments import base_option, data_option, output_option

if TYPE_CHECKING:
    from edgetune.progress import Progress

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
    from edgetune.proposal.files import is_data  # noqa: PLC0415 - help needs none of it

    files = [*(data or ()), *(path for path in paths or () if is_data(path))]
    if base is not None and not files:
        raise UsageError("--base is for a recipe of your data", "give data too: --data FILE")
    target = _target([path for path in paths or () if not is_data(path)])
    if target.exists() and not force:
        raise UsageError(
            f"{target} already exists", "choose another file" + ", or replace it with --force" * bool(files)
        )
    _write(target, files, base)
    print(target)


def recipe_to_build(paths: Sequence[Path], out: Path | None, base: str | None, progress: Progress) -> Path:
    """The recipe of a build: the one that is given; for data files the one beside the bundle, made if there is none."""
    from edgetune.proposal.files import is_data, slug  # noqa: PLC0415 - as above
    from edgetune.proposal.recipe import default_name  # noqa: PLC0415

    files = [path for path in paths if is_data(path)]
    if not files and len(paths) == 1:
        return paths[0]
    other = next((path for path in paths if path not in files), None)
    if other is not None:
        raise UsageError(f"{other} is not a data file", "give one recipe, or data files only")
    bundle = out or Path("build") / default_name(files)
    recipe = bundle.with_name(f"{bundle.name}.yaml")
    if recipe.exists():
        _check_same(recipe, files)
        progress.say(
            f"using the recipe {recipe} of an earlier build; change it there, or delete it to have it made again"
        )
    else:
        _write(recipe, files, base, name=slug(bundle.name))
        progress.say(f"made the recipe {recipe}; change it there and build again")
    return recipe


def _target(paths: Sequence[Path]) -> Path:
    """The recipe to write, of the paths that name no data file."""
    if len(paths) > 1:
        raise UsageError(f"{paths[1]} is not a data file", "give one recipe to write, and data as .jsonl, .csv or .tsv")
    path = paths[0] if paths else DEFAULT_RECIPE
    return path / DEFAULT_RECIPE if path.is_dir() else path


def _write(target: Path, files: Sequence[Path], base: str | None, *, name: str | None = None) -> None:
    """Write a recipe for these files, or for none the example with its data."""
    from edgetune_runtime.formats.atomic import replacing  # noqa: PLC0415 - as above

    from edgetune.proposal.recipe import DEFAULT_BASE, recipe_for  # noqa: PLC0415
    from edgetune.recipe.model import TEMPLATE, TEMPLATE_DATA  # noqa: PLC0415

    target.parent.mkdir(parents=True, exist_ok=True)
    text = recipe_for(files, base=base or DEFAULT_BASE, path=target, name=name).text if files else TEMPLATE
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for source in () if files else TEMPLATE_DATA.iterdir():
        example = target.parent / "data" / source.name
        if not example.exists():
            with replacing(example) as temporary:
                temporary.write_bytes(source.read_bytes())


def _check_same(recipe: Path, files: Sequence[Path]) -> None:
    """UsageError if the recipe trains on other files."""
    from edgetune.proposal.files import tasks_of  # noqa: PLC0415 - as above
    from edgetune.recipe.model import Recipe  # noqa: PLC0415

    used = {Path(str(spec.data.train)).resolve() for spec in Recipe.from_file(recipe).adapters.values()}
    if used != {task.train.resolve() for task in tasks_of(files)}:
        message = f"{recipe} is a recipe for other data"
        raise UsageError(message, "remove it, choose another --out, or build with that recipe")
