"""Trains the adapters of a build on a Ray cluster, each as a task in the work folder, which all nodes share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import CancelledError, EdgetuneError

from edgetune.common.cluster import ClusterTask, connected
from edgetune.common.module_process import write_request
from edgetune.common.progress import Progress
from edgetune.planning.records import BuildPlan
from edgetune.recipe.model import Recipe
from edgetune.recipe.saved import save_recipe
from edgetune.shipping.exported import BuildBase, Prepared
from edgetune.training.job import finished

MODULE = "edgetune.building.node"
"""The module that trains an adapter in the folder of its request."""


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter to train on a node: the recipe's file, the work folder, and the key of the training job.

    The key shows whether the node reads the same base and rows as the head.
    """

    recipe: str
    name: str
    work: str
    key: str


def train_on_cluster(prepared: Prepared[Any], work: Path, progress: Progress) -> None:
    """Train the adapters that are not trained yet; the result of each is in `work`, as of a training on this machine.

    Raises IncompatibleError if no node can train one, EdgetuneError with a line for each training that failed, after
    the others have ended, and CancelledError when the user interrupts.
    """
    jobs = [item.job for item in prepared.adapters]
    left = [job for job in jobs if finished(work / "train" / job.name, job.key) is None]
    if not left:
        return
    folder = work.absolute() / "cluster"
    recipe = save_recipe(_recipe_of_nodes(prepared.plan, prepared.base, work), folder)
    failures = []
    with connected() as cluster:
        takes_gpu = cluster.has_gpus and prepared.plan.recipe.training.device != "cpu"
        cpus, gpus = (1, 1) if takes_gpu else (cluster.cpus_each(len(left)), 0)
        needs = prepared.plan.needs
        memory_mb = 0.0 if needs is None else needs.needs.training_mb
        tasks = []
        for job in left:
            request = AdapterRequest(str(recipe.absolute()), job.name, str(work.absolute()), job.key)
            asked = write_request(folder / job.name, request)
            tasks.append(ClusterTask(job.name, MODULE, asked, cpus, gpus, memory_mb))
        reserved = f"GPUs for each: {gpus}" if gpus else f"cores for each: {cpus}"
        progress.say(f"training {len(tasks)} adapters on the cluster; {reserved}")
        try:
            for name, reason in cluster.run(tasks, progress):
                progress.say(f"{name}: {reason or 'trained'}")
                failures += [f"adapter {name!r} was not trained: {reason}"] if reason else []
        except KeyboardInterrupt as error:
            raise CancelledError("training on the cluster stopped", "run the same command to resume") from error
    if failures:
        raise EdgetuneError("\n".join(failures))


def _recipe_of_nodes(plan: BuildPlan, base: BuildBase, work: Path) -> Recipe:
    """The recipe with everything that was chosen, and with the base that was made in the work folder."""
    base_keys = {"base": str(base.path.absolute()), "quantization": None, "imatrix": None, "domain": None}
    return plan.recipe.model_copy(update=base_keys if base.path.is_relative_to(work) else {})
