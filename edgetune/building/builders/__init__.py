"""Builders: one file per task, whose BUILDER implements the steps of a build that depend on the task."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from edgetune.recipe import task_types
from edgetune.shipping.builder import Builder

__all__ = ["Builder", "load"]


def load(task: str) -> Builder[Any]:
    """The builder of a task; UsageError for an unknown task."""
    task_types.load(task)
    builder: Builder[Any] = import_module(f"{__name__}.{task.replace('-', '_')}").BUILDER
    return builder
