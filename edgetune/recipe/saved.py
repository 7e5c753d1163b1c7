"""Writes a recipe that was made in Python to files, for processes that read it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
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
    values = values_of(recipe)
    left = {path.resolve() for path in copied_from}
    for loc, source in recipe.sources():
        saved = save_source(source, folder)
        if Path(saved).parent.resolve() in left:
            saved = str(shutil.copy(saved, folder.absolute()))
        # A folder that was moved still has its files. A name such as ~rows would be read as that of a home.
        is_own = Path(saved).parent == folder.absolute() and not Path(saved).name.startswith("~")
        value_at(loc[:-1], values)[loc[-1]] = Path(saved).name if is_own else saved
    path = folder / RECIPE
    write_file(path, json_in_yaml(values, indent=2))
    return path


def values_of(recipe: Recipe) -> dict[str, Any]:
    """What `Recipe.from_dict` makes the same recipe from, with absolute paths. What is not set stays unset."""
    values = recipe.model_dump(exclude_unset=True)
    base = recipe.folder / expanded(recipe.base)
    if base.exists():
        values["base"] = str(base.absolute())
    for name, spec in recipe.adapters.items():
        if spec.start_from is not None:
            values["adapters"][name]["start_from"] = str(Path(spec.start_from).absolute())
    for loc, source in recipe.sources():
        value_at(loc[:-1], values)[loc[-1]] = source if isinstance(source, Rows) else _absolute(source)
    return values


def save_source(source: str | Rows, folder: Path) -> str:
    """The absolute path of a data file, which rows from memory are written to; a hub id is unchanged."""
    if isinstance(source, Rows):
        path = folder / f"{source}.jsonl"
        write_file(path, source.text)
        return str(path.absolute())
    return _absolute(source)


def _absolute(source: str) -> str:
    path = Path(source)
    return str(path.absolute()) if path.exists() else source
