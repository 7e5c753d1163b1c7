"""Recipes of short trainings, and the files of their rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.recipe.model import Recipe

NAME = "recipe.yaml"
TRAINING: dict[str, Any] = {
    "max_steps": 6, "evals": 2, "batch_size": 4, "learning_rate": 5e-3, "precision": "fp32",
}  # fmt: skip
PLAIN: dict[str, Any] = {"draft": False, "golden": False, "confidence": False}
"""An adapter without what a build makes with answers to its rows."""


def lights(count: int = 10, completions: Sequence[object] = ("reply on",)) -> list[dict[str, Any]]:
    """Rows of one prompt each; the completions take turns."""
    return [
        {"prompt": f"turn on the light {number}", "completion": completions[number % len(completions)]}
        for number in range(count)
    ]


LIGHTS = lights()


def thermometers(count: int, rooms: int, first: int = 0) -> list[dict[str, Any]]:
    """Conversations with a call, whose result is that of no other; the rooms take turns, and are written in two ways"""
    tool = {"name": "heat", "parameters": {"type": "object", "properties": {"room": {"type": "string"}}}}
    rows = []
    for number in range(first, first + count):
        room = f"room {number % rooms}"
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"{('how', 'How')[number // rooms % 2]} warm is {room}?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "heat", "arguments": {"room": room}}}]},
            {"role": "tool", "content": f"{number} degrees"},
            {"role": "assistant", "content": f"It has {number} degrees."},
        ]
        rows.append({"tools": [tool], "messages": turns})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines, or as a table with a header if the file is a .csv; returns the file."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return path


def adapter_of(
    method: object = "lora", *, train: object = "rows.jsonl", held_out: float = 0.2, **keys: object
) -> dict[str, Any]:
    """The values of an adapter; `keys` go over them."""
    return {"data": {"train": train, "held_out": held_out}, "method": method, **keys}


def values_of(
    base: Path | str,
    adapters: Mapping[str, object] | None = None,
    training: Mapping[str, object] | None = None,
    **keys: object,
) -> dict[str, Any]:
    """The values of a recipe, by default with one adapter, `command`; `training` goes over TRAINING.

    Tiny bases are computed with one thread: more wait for each other, for longer than they compute.
    """
    return {
        "name": "home",
        "base": str(base),
        "threads": 1,
        "training": {**TRAINING, **(training or {})},
        "adapters": {"command": adapter_of()} if adapters is None else adapters,
        **keys,
    }


def write_recipe(
    folder: Path,
    base: Path | str,
    adapters: Mapping[str, object] | None = None,
    *,
    data: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    **keys: Any,  # noqa: ANN401 - those of `values_of`
) -> Path:
    """Write recipe.yaml, one key per line, and its `data`: rows by the name of their file, by default LIGHTS."""
    for name, rows in ({"rows.jsonl": LIGHTS} if data is None else data).items():
        write_rows(folder / name, rows)
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in values_of(base, adapters, **keys).items()]
    path = folder / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_recipe(*arguments: Any, **keys: Any) -> Recipe:  # noqa: ANN401 - those of `write_recipe`
    """The recipe of the file that `write_recipe` writes."""
    return Recipe.from_file(write_recipe(*arguments, **keys))
