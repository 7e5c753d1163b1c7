"""Writes a recipe that was made in Python to files, for processes that read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from edgetune.common.files import expanded, write_file

from .model import Recipe
from .problems import json_in_yaml, value_at
from .rows import Rows

RECIPE = "recipe.json"


def save_recipe(recipe: Recipe, folder: Path, *, copied_from: Collection[Path] = ()) -> Path:
    """Write `recipe.json`, from which `Recipe.from_file` makes the same recipe, with rows from memory in files beside.

    Other paths become absolute. What is not set stays unset, because some defaults depend on the base or the board.
    Data files in the folders `copied_from` are copied. OutOfSpaceError if the disk is full.
    """
    left = {path.resolve() for path in copied_from}

    def saved(source: str | Rows) -> str:
        path = save_source(source, folder)
        if Path(path).parent.resolve() in left:
            path = str(shutil.copy(path, folder.absolute()))
        # A folder that was moved still has its files. A name such as ~rows would be read as that of a home.
        is_own = Path(path).parent == folder.absolute() and not Path(path).name.startswith("~")
        return Path(path).name if is_own else path

    path = folder / RECIPE
    write_file(path, json_in_yaml(recipe_values(recipe, saved), indent=2))
    return path


def _absolute(source: str | Rows) -> str | Rows:
    return str(Path(source).absolute()) if isinstance(source, str) and Path(source).exists() else source


def recipe_values(recipe: Recipe, of_source: Callable[[str | Rows], str | Rows] = _absolute) -> dict[str, Any]:
    """What `Recipe.from_dict` makes the same recipe from, with absolute paths. What is not set stays unset."""
    values = recipe.model_dump(exclude_unset=True)
    base = recipe.folder / expanded(recipe.base)
    if base.exists():
        values["base"] = str(base.absolute())
    for name, spec in recipe.adapters.items():
        if spec.start_from is not None:
            values["adapters"][name]["start_from"] = str(Path(spec.start_from).absolute())
    for loc, source in recipe.sources():
        value_at(loc[:-1], values)[loc[-1]] = of_source(source)
    return values


def save_source(source: str | Rows, folder: Path) -> str:
    """The absolute path of a data file, which rows from memory are written to; a hub id is unchanged."""
    if isinstance(source, Rows):
        path = folder / f"{source}.jsonl"
        write_file(path, source.text)
        return str(path.absolute())
    return str(_absolute(source))
