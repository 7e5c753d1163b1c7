"""Trains one adapter of a build on a node of a cluster; `python -m edgetune.building.node FOLDER` runs it as a process.

What is finished in the work folder is not done again, and an interrupted training resumes, also on another node.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import EdgetuneError, IncompatibleError
from filelock import FileLock, Timeout

from edgetune.common.cluster import TRY_ELSEWHERE
from edgetune.common.failure import fail
from edgetune.common.module_process import end_with_parent, read_request
from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.builder import Builder
from edgetune.training.job import TrainingJob
from edgetune.training.jobs import train_all

from . import builders
from .on_cluster import AdapterRequest
from .plan import plan_build, with_download

# The process of a node that is gone may take this long to end.
_WAIT_S = 120.0


def main(folder: Path) -> int:
    """Train the adapter in the request of `folder` and return the exit code; an error is printed as one line."""
    end_with_parent()
    try:
        request = AdapterRequest(**read_request(folder))
        with FileLock(folder / "lock", timeout=_WAIT_S):
            try:
                builder, base, job = _prepared(request, Progress())
            except (EdgetuneError, ImportError) as error:
                # The head has prepared the same, so this node lacks something.
                fail(error)
                return TRY_ELSEWHERE
            train_all([job], base.name, partial(builder.load_torch, base), Path(request.work) / "train", Progress())
    except Timeout:
        return fail(EdgetuneError(f"another process trains {folder.name}", "end it and run the build again"))
    except (Exception, KeyboardInterrupt) as error:
        return fail(error)
    return 0


def _prepared(request: AdapterRequest, progress: Progress) -> tuple[Builder[Any], Any, TrainingJob[Any]]:
    """The base and the training job; IncompatibleError if they are not those of the head."""
    recipe = Recipe.from_file(request.recipe).only([request.name])
    work = Path(request.work)
    planned = plan_build(recipe, work)
    if planned.plan.source is None:
        planned = with_download(planned, work)
    builder = builders.load(recipe.task)
    base = builder.base_to_train(planned, work, progress, None)
    (item,) = builder.jobs(planned.plan, planned.tasks, base, progress)
    if item.job.key != request.key:
        message = "it has another base or other rows than the machine that builds"
        raise IncompatibleError(message, "share the recipe's folder and data with all nodes")
    return builder, base, item.job


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
