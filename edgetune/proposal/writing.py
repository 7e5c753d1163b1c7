"""Writes recipes for data files, for `edgetune init` and `edgetune build FILE.csv`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from edgetune_export.pack import check_destination
from edgetune_runtime.errors import UsageError
from ruamel.yaml import YAML

from edgetune.common.files import write_file
from edgetune.common.progress import Progress
from edgetune.common.work_folder import beside, named
from edgetune.recipe.model import TEMPLATE, TEMPLATE_DATA, Recipe, model_at
from edgetune.recipe.problems import override

from .files import is_data, slug, tasks_of
from .recipe import DEFAULT_BASE, default_name, recipe_for


def recipe_to_build(paths: Sequence[Path], out: Path | None, base: str | None, progress: Progress) -> Path:
    """The recipe among `paths`, or else the one for these data files beside the bundle, which is written if missing.

    UsageError for a mixture of both, for data files also what `check_destination` raises, and if the recipe beside the
    bundle is for other data.
    """
    files = [path for path in paths if is_data(path)]
    if not files and len(paths) == 1:
        return paths[0]
    other = next((path for path in paths if path not in files), None)
    if other is not None:
        raise UsageError(f"{other} is not a data file", "give one recipe, or data files only")
    bundle = named(out or Path("build") / default_name(files))
    check_destination(bundle)
    recipe = beside(bundle, ".yaml")
    if recipe.exists():
        _check_same(recipe, files)
        progress.say(
            f"using the recipe {recipe} of an earlier build; change it there, or delete it to have it made again"
        )
    else:
        write_recipe(recipe, files, base, name=slug(bundle.name))
        progress.say(f"made the recipe {recipe}; change it there and build again")
    return recipe


def write_recipe(target: Path, files: Sequence[Path], base: str | None, *, name: str | None = None) -> None:
    """Write a recipe for these files, or for none the example with its data."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = recipe_for(files, base=base or DEFAULT_BASE, path=target, name=name).text if files else TEMPLATE
    write_file(target, text)
    for source in () if files else TEMPLATE_DATA.iterdir():
        example = target.parent / "data" / source.name
        if not example.exists():
            write_file(example, source.read_bytes())


def write_settings(recipe: Path, settings: Mapping[str, Any]) -> list[str]:
    """Set dotted keys of a recipe file, as `Recipe.from_file` takes them; its comments stay.

    Returns the keys that are in other files, those of its adapters.

    `edgetune learn` and `rebase` read the recipe beside a bundle, and train as its build did.
    """
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = sys.maxsize, True
    values = yaml.load(recipe.read_text(encoding="utf-8"))
    lost = [key for key, value in settings.items() if override(values, key, value, model_at)]
    text = StringIO()
    yaml.dump(values, text)
    write_file(recipe, text.getvalue())
    return lost


def _check_same(recipe: Path, files: Sequence[Path]) -> None:
    """UsageError if the recipe trains on other files."""
    used = {Path(str(spec.data.train)).resolve() for spec in Recipe.from_file(recipe).adapters.values()}
    if used != {task.train.resolve() for task in tasks_of(files)}:
        message = f"{recipe} is a recipe for other data"
        raise UsageError(message, "remove it, choose another --out, or build with that recipe")
