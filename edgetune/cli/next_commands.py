"""The commands that follow a build: run the bundle, score it, report on it, and see whether it fits a board."""

from __future__ import annotations

import shlex

from edgetune import task_types
from edgetune.recipe.model import Recipe
from edgetune.result import Build

_BOARD = "pi-5"


def next_commands(recipe: Recipe, result: Build) -> list[str]:
    """Shell commands for the bundle just built, ready to copy, for its first adapter and a prompt of its task.

    `fit` is left out for tasks without a prediction for boards.
    """
    name, spec = next(iter(recipe.adapters.items()))
    command = "classify" if result.trained[name].plan.labels else "generate"
    run = [command, result.bundle, "--adapter", name, "--prompt", result.prompts[name]]
    data = spec.data.validation or spec.data.train
    score = ["edgetune", "evaluate", result.bundle, "--adapter", name, "--data", data]
    commands = [["edgetune-run", *run], score, ["edgetune", "report", result.bundle, "--out", f"{result.bundle}.html"]]
    if task_types.load(recipe.task).offers("fit"):
        device = recipe.device or _BOARD
        commands.append(["edgetune", "devices", "fit", result.bundle, "--device", device])
    return [shlex.join(map(str, command)) for command in commands]
