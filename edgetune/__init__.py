"""Train one small adapter per task on one quantized base, and ship them to small boards as GGUF or ONNX.

build = edgetune.build("recipe.yaml")
with build.open() as runtime:
    print(runtime.generate("turn off the lamp in the hall", adapter="command").text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune_runtime.errors import EdgetuneError

    from .api import build, compare, evaluate, export, learn, plan, rebase
    from .building.result import Build
    from .common.progress import ProgressEvent
    from .comparison.comparison import Comparison
    from .planning.records import BuildPlan
    from .recipe.model import Recipe
    from .retraining.learning.change import Change
    from .retraining.learning.learn import Learned
    from .retraining.rebasing.rebase import BundleFigures, Rebased
    from .tasks.evaluation import Evaluation, ScoredRow
    from .training.job import Point

__all__ = [
    "Build",
    "BuildPlan",
    "BundleFigures",
    "Change",
    "Comparison",
    "EdgetuneError",
    "Evaluation",
    "Learned",
    "Point",
    "ProgressEvent",
    "Rebased",
    "Recipe",
    "ScoredRow",
    "build",
    "compare",
    "evaluate",
    "export",
    "learn",
    "plan",
    "rebase",
]

# Loaded on first use: most of them need numpy, pydantic or torch.
_MODULES = {
    "edgetune.api": ("build", "compare", "evaluate", "export", "learn", "plan", "rebase"),
    "edgetune.building.result": ("Build",),
    "edgetune.common.progress": ("ProgressEvent",),
    "edgetune.comparison.comparison": ("Comparison",),
    "edgetune.planning.records": ("BuildPlan",),
    "edgetune.recipe.model": ("Recipe",),
    "edgetune.retraining.learning.change": ("Change",),
    "edgetune.retraining.learning.learn": ("Learned",),
    "edgetune.retraining.rebasing.rebase": ("BundleFigures", "Rebased"),
    "edgetune.tasks.evaluation": ("Evaluation", "ScoredRow"),
    "edgetune.training.job": ("Point",),
    "edgetune_runtime.errors": ("EdgetuneError",),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:
    # Hidden from type checkers, which would take it for every name that does not exist.
    def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
