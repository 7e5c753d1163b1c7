"""The commands that follow a build: run the bundle, score it, report on it, and see whether it fits a board."""

from __future__ import annotations

import shlex
from pathlib import Path

from edgetune import task_types
from edgetune.building.result import Build
from edgetune.recipe.model import Recipe

_BOARD = "pi-5"


def next_commands(path: Path, recipe: Recipe, result: Build) -> list[str]:
    """Shell commands, ready to copy, for the bundle just built from `path`: its first adapter, a prompt of its task.

    `fit` is left out for tasks without a prediction for boards.
    """
    name, spec = next(iter(recipe.adapters.items()))
    command = "classify" if result.trained[name].plan.labels else "generate"
    run = [command, result.bundle, "--adapter", name, "--prompt", result.prompts[name]]
    data = spec.data.validation or spec.data.train
    score = ["edgetune", "evaluate", result.bundle, "--adapter", name, "--data", data]
    report = ["edgetune", "report", result.bundle, "--recipe", path, "--out", f"{result.bundle}.html"]
    commands = [["edgetune-run", *run], score, report]
    if task_types.load(recipe.task).offers("fit"):
        device = recipe.device or _BOARD
        commands.append(["edgetune", "devices", "fit", result.bundle, "--device", device])
    return [shlex.join(map(str, command)) for command in commands]
