"""Writes a recipe that was made in Python to files, for processes that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .model import Recipe
from .parts import AdapterSpec, DomainSpec
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
    parts: list[tuple[dict[str, Any], AdapterSpec | DomainSpec]]
    parts = [(values["adapters"][name], spec) for name, spec in recipe.adapters.items()]
    if recipe.domain is not None:
        parts.append((values["domain"], recipe.domain))
    for part, spec in parts:
        for key in ("train", "validation", "confidence"):
            source = getattr(spec.data, key, None)
            if source is not None:
                part["data"][key] = save_source(source, folder)
        document = part.get("method", {}).get("document")
        if document is not None:
            part["method"]["document"] = save_source(document, folder)
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
