"""Runs modules as tasks on a Ray cluster; a task goes on elsewhere when its node dies or cannot run it.

The nodes need the same version of edgetune, and share the folders of the tasks.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.wording import shortened

from .progress import Progress

TRY_ELSEWHERE = 75
"""The exit code of a module that this node cannot run, and another one may: EX_TEMPFAIL of sysexits.h."""
# A task that takes its node with it, such as one that fills the memory, is given up after this many nodes.
_MOST_DEATHS = 3
# How often to check whether there is still a node for every task.
_CHECK_S = 5.0
_NODE_ID = "ray.io/node-id"
_REMEDY = "add a node, or use the engine local; what has ended is kept"


@dataclass(frozen=True)
class ClusterTask:
    """A module to run on a folder, and what it reserves of its node; `memory_mb` at most what the node has."""

    name: str
    module: str
    folder: Path
    cpus: int
    gpus: int = 0
    memory_mb: float = 0.0


def load_ray() -> Any:  # noqa: ANN401 - ray carries no types
    """The module `ray`; IncompatibleError with the extra to install if it is missing."""
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise IncompatibleError("engine ray needs Ray", 'run: pip install "edgetune[ray]"') from error
    return ray


@contextmanager
def connected() -> Iterator[Cluster]:
    """The cluster at RAY_ADDRESS, or a local one with this machine's cores; what still runs at the end is stopped.

    IncompatibleError if Ray is missing, or no cluster answers there.
    """
    ray = load_ray()
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except ConnectionError as error:
            message = f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
            raise IncompatibleError(message, "start it, or unset RAY_ADDRESS for a local one") from error
    try:
        yield Cluster(ray)
    finally:
        if started:
            ray.shutdown()


class Cluster:
    """A Ray cluster that this process is connected to; `ray` is the module."""

    def __init__(self, ray: Any) -> None:  # noqa: ANN401 - ray carries no types
        self._ray = ray
        self._left_out: dict[str, str] = {}
        # A node without edgetune could not import this module.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._remote = ray.remote(_on_node)

    @property
    def has_gpus(self) -> bool:
        """Whether a node has a GPU."""
        return any(node["Resources"].get("GPU", 0) >= 1 for node in self._nodes())

    def cpus_each(self, tasks: int) -> int:
        """The cores that each of so many tasks can have if they are spread over all nodes; at least 1."""
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._nodes()]
        able = [count for count in cores if count]
        return max(1, min(able) // math.ceil(tasks / len(able))) if able else 1

    def run(self, tasks: Sequence[ClusterTask], progress: Progress) -> Iterator[tuple[str, str]]:
        """Run the tasks; yields the name of each that ended, and why it failed, or "".

        A node that cannot run a task gets no more tasks, which is reported in one line. Raises IncompatibleError if no
        node is left that can run a task; what has ended is kept.
        """
        errors = self._ray.exceptions
        deaths: Counter[str] = Counter()
        running = {self._submit(task): task for task in tasks}
        try:
            while running:
                for reference in self._ray.wait(list(running), timeout=_CHECK_S)[0]:
                    task = running.pop(reference)
                    try:
                        node, code, reason = self._ray.get(reference)
                    except (errors.NodeDiedError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
                        deaths[task.name] += 1
                        if deaths[task.name] == _MOST_DEATHS:
                            yield task.name, f"{_MOST_DEATHS} nodes or processes died: {shortened(str(error))}"
                            continue
                        progress.say(f"{task.name}: its node died; it goes on elsewhere")
                    except errors.RayError as error:
                        yield task.name, shortened(str(error))
                        continue
                    else:
                        if code != TRY_ELSEWHERE:
                            yield task.name, reason
                            continue
                        self._leave_out(node, reason, progress)
                    running[self._submit(task)] = task
                self._check_nodes(running.values())
        finally:
            for reference in running:
                # Nothing else ends a worker that waits for its module, which then saves and ends too.
                self._ray.cancel(reference, force=True)

    def _submit(self, task: ClusterTask) -> Any:  # noqa: ANN401 - a reference of ray
        largest = max((node["Resources"].get("memory", 0) for node in self._able(task)), default=0)
        options = {
            "name": task.name,
            "num_cpus": task.cpus,
            "num_gpus": task.gpus,
            "memory": int(min(task.memory_mb * 1e6, largest)),
            "max_retries": 0,
        }
        if self._left_out:
            options["label_selector"] = {_NODE_ID: f"!in({','.join(self._left_out)})"}
        return self._remote.options(**options).remote(task.module, str(task.folder), version("edgetune"))

    def _leave_out(self, node: str, reason: str, progress: Progress) -> None:
        if node not in self._left_out:
            address = next((n["NodeManagerAddress"] for n in self._ray.nodes() if n["NodeID"] == node), "")
            self._left_out[node] = f"node {address} ({node[:8]}) is left out: {reason}"
            progress.say(f"warning: {self._left_out[node]}")

    def _check_nodes(self, tasks: Iterable[ClusterTask]) -> None:
        """IncompatibleError if no node is left for one of the tasks."""
        for task in tasks:
            if not self._able(task):
                needs = f"{task.cpus} cores" + (f" and {task.gpus} GPU" if task.gpus else "")
                why = "; ".join(self._left_out.values()) or f"none has {needs}"
                raise IncompatibleError(f"no node of the cluster can run {task.name}: {why}", _REMEDY)

    def _able(self, task: ClusterTask) -> list[Any]:
        """The nodes that could run the task."""
        return [
            node
            for node in self._nodes()
            if node["Resources"].get("CPU", 0) >= task.cpus and node["Resources"].get("GPU", 0) >= task.gpus
        ]

    def _nodes(self) -> list[Any]:
        return [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._left_out]


def _on_node(module: str, folder: str, requested: str) -> tuple[str, int, str]:
    """Run a module on this node, if it has the version `requested`: the node's id, and what `run_module` returns."""
    import ray  # noqa: PLC0415 - an extra

    node = ray.get_runtime_context().get_node_id()
    try:
        installed = f"edgetune {version('edgetune')}"
    except PackageNotFoundError:
        installed = "no edgetune"
    if installed != f"edgetune {requested}":
        return node, TRY_ELSEWHERE, f"it has {installed}; run there: pip install edgetune=={requested}"
    if not Path(folder).is_dir():
        return node, TRY_ELSEWHERE, f"it has no folder {folder}; share it with all nodes"
    # This function is sent to the node alone.
    from .module_process import run_module  # noqa: PLC0415

    return node, *run_module(module, Path(folder), lambda _: None)
