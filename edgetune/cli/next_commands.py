"""The commands that follow a build: run the bundle, score it, and see whether it fits a board."""

from __future__ import annotations

import shlex
from pathlib import Path

from edgetune import task_types
from edgetune.recipe.model import Recipe
from edgetune.tasks import read_task

_SAMPLE_CHARACTERS = 80
_ANY_PROMPT = "hello"
_BOARD = "pi-5"


def next_commands(recipe: Recipe, bundle: Path) -> list[str]:
    """Shell commands for the bundle just built, ready to copy, for its first adapter and a row of its validation data.

    `fit` is left out where what a bundle takes on a board is not predicted.
    """
    name, spec = next(iter(recipe.adapters.items()))
    run = [_run(recipe, name), bundle, "--adapter", name, "--prompt", _sample_prompt(recipe, name)]
    score = ["edgetune", "evaluate", bundle, "--adapter", name, "--data", spec.data.validation or spec.data.train]
    commands = [["edgetune-run", *run], score]
    if task_types.load(recipe.task).offers("fit"):
        device = recipe.device or _BOARD
        commands.append(["edgetune", "devices", "fit", bundle, "--device", device])
    return [shlex.join(map(str, command)) for command in commands]


def _run(recipe: Recipe, name: str) -> str:
    """`classify` where the adapter has labels, else `generate`."""
    has_labels = task_types.load(recipe.task).metric == "label" or bool(recipe.adapters[name].labels)
    return "classify" if has_labels else "generate"


def _sample_prompt(recipe: Recipe, name: str) -> str:
    """The last turn before the answer of a validation row, one that is short and could be no option."""
    rows = read_task(name, recipe).validation
    texts = [row.text if row.messages is None else str(row.messages[-1]["content"]) for row in rows]
    fitting = (text for text in texts if text and len(text) <= _SAMPLE_CHARACTERS and not text.startswith("-"))
    return " ".join(next(fitting, _ANY_PROMPT).split())
