"""Writes a recipe that was made in Python to files, for processes that read it."""

from __future__ import annotations

import json
from pathlib import Path

from .model import Recipe
from .problems import value_at
from .rows import Rows

RECIPE = "recipe.json"


def save_recipe(recipe: Recipe, folder: Path) -> Path:
    """Write `recipe.json`, from which `Recipe.from_file` makes the same recipe, with rows from memory in files beside.

    Paths become absolute. What is not set stays unset, because some defaults depend on the base or the board.
    """
    values = recipe.model_dump(exclude_unset=True)
    base = recipe.folder / Path(recipe.base).expanduser()
    if base.exists():
        values["base"] = str(base.absolute())
    for loc, source in recipe.sources():
        value_at(loc[:-1], values)[loc[-1]] = save_source(source, folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path


def save_source(source: str | Rows, folder: Path) -> str:
    """The absolute path of a data file, which rows from memory are written to; a hub id is unchanged."""
    if isinstance(source, Rows):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{source}.jsonl"
        path.write_text(source.text, encoding="utf-8")
    else:
        path = Path(source)
    return str(path.absolute()) if path.exists() else str(source)
