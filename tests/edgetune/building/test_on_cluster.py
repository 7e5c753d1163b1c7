"""Builds and comparisons on a real Ray cluster of this machine: a head without cores, and nodes that can be killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.bundle import AdapterEntry, read_manifest, sha256_of, verify_files
from edgetune_runtime.errors import CancelledError, EdgetuneError, IncompatibleError
from filelock import FileLock
from recipes import adapter_of, lights, make_recipe, write_recipe
from trainings import QUIET, Listening, modified
from waiting import wait_for

from edgetune.building.pipeline import build
from edgetune.cli.main import main
from edgetune.comparison import grid
from edgetune.comparison.engines import run_on_ray
from edgetune.comparison.figures import read_outcome
from edgetune.recipe.model import Recipe

LORA = {"name": "lora", "r": 2}
NAMES = ("blinds", "lamps")
# Of a training, but not of its result.
MEASURED = ("seconds", "tokens_per_s", "peak_memory_mb")
STORE_BYTES = 80 * 2**20
# A thread that gives up would let the build run to its end.
SAVED_WITHIN_S = 600


class LocalCluster:
    """A cluster whose nodes are processes of this machine; this process is connected to its head.

    A node takes 5 s of CPU time to start and to end, so the nodes of `have` stay for the next test.
    """

    def __init__(self, ray: Any) -> None:  # noqa: ANN401 - ray carries no types
        from ray.cluster_utils import Cluster  # noqa: PLC0415 - an extra

        self.ray = ray
        self.lasting: list[Any] = []
        self.cluster = Cluster(initialize_head=True, head_node_args=self._sizes(0))
        self._connect()

    def _connect(self) -> None:
        self.ray.init(address=self.cluster.address, log_to_driver=False)

    @contextmanager
    def disconnected(self) -> Iterator[None]:
        """Connect to nothing in the block, as a process that starts."""
        self.ray.shutdown()
        try:
            yield
        finally:
            self._connect()

    @contextmanager
    def seen_free(self, resource: str) -> Iterator[set[float]]:
        """The amounts of a resource that were free in the block, all of them after it."""
        seen, ended = set[float](), threading.Event()

        def look() -> None:
            while not ended.wait(0.1):
                seen.add(self.cluster.global_state.available_resources().get(resource, 0))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield seen
        finally:
            ended.set()
            looking.join()

    def add(self, cpus: int = 1, **options: Any) -> Any:  # noqa: ANN401 - as above
        return self.cluster.add_node(**self._sizes(cpus), **options)

    def have(self, count: int) -> list[Any]:
        """So many nodes with one core each; all others are removed."""
        self.lasting = [node for node in self.lasting if node in self.cluster.worker_nodes][:count]
        self.remove_others()
        self.lasting += [self.add() for _ in range(count - len(self.lasting))]
        return self.lasting

    def remove_others(self) -> None:
        for node in self.cluster.worker_nodes.difference(self.lasting):
            self.cluster.remove_node(node)

    def occupy(self, node: Any) -> Any:  # noqa: ANN401 - as above
        """Keep the only core of a node busy; the result can be cancelled."""
        remote = self.ray.remote(lambda: time.sleep(3600))
        busy = remote.options(num_cpus=1, max_retries=0, label_selector={"ray.io/node-id": node.node_id}).remote()
        while self.ray.available_resources().get("CPU", 0) == self.ray.cluster_resources()["CPU"]:
            time.sleep(0.05)
        return busy

    def kill(self, node: Any) -> None:  # noqa: ANN401 - as above
        self.cluster.remove_node(node, allow_graceful=False)

    @contextmanager
    def node_without(self, folder: Path) -> Iterator[None]:
        """A node that sees an empty folder there; skips where this user cannot mount one."""
        start = "from ray.scripts.scripts import main; main()"
        ray = [sys.executable, "-c", start, "start", "--address", self.cluster.address, "--block", "--num-cpus", "1"]
        hiding = f"mount -t tmpfs none {folder} && exec {shlex.join(ray)} --object-store-memory {STORE_BYTES}"
        if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs root to hide a folder from a node")
        before = len(self.ray.nodes())
        with subprocess.Popen(["unshare", "-m", "sh", "-c", hiding], start_new_session=True) as process:
            try:
                while len(self.ray.nodes()) == before:
                    assert process.poll() is None
                    time.sleep(0.1)
                yield
            finally:
                os.killpg(process.pid, signal.SIGTERM)

    def close(self) -> None:
        self.ray.shutdown()
        self.cluster.shutdown()

    def _sizes(self, cpus: int) -> dict[str, Any]:
        return {"num_cpus": cpus, "object_store_memory": STORE_BYTES, "include_dashboard": False}


@pytest.fixture(scope="module")
def head() -> Iterator[LocalCluster]:
    """A cluster without nodes, which takes 5 s to start and to end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        made = LocalCluster(pytest.importorskip("ray"))
        yield made
        made.close()


@pytest.fixture
def cluster(head: LocalCluster) -> Iterator[LocalCluster]:
    yield head
    head.remove_others()


def recipe_of(folder: Path, base: Path, names: tuple[str, ...] = NAMES, **keys: Any) -> Recipe:  # noqa: ANN401 - of the recipe
    data = {f"{name}.jsonl": lights(completions=(f"turn the {name} on",)) for name in names}
    adapters = {name: adapter_of(LORA, train=f"{name}.jsonl") for name in names}
    return make_recipe(folder, base, adapters, data=data, **keys)


def results(bundle: Path) -> list[AdapterEntry]:
    """What the manifest of a bundle says of its adapters, without what was measured in training."""
    entries = read_manifest(bundle).adapters.values()
    return [
        replace(entry, training={key: value for key, value in entry.training.items() if key not in MEASURED})
        for entry in entries
    ]


def weights(bundle: Path) -> dict[str, str]:
    """The sha256 of the files of the base and the adapters."""
    files = [path for part in ("base", "adapters") for path in (bundle / part).rglob("*") if path.is_file()]
    return {path.relative_to(bundle).as_posix(): sha256_of(path) for path in files}


def test_an_interrupted_training_is_saved_and_its_process_ends(
    cluster: LocalCluster, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    training = {"max_steps": 5000, "epochs": 10_000, "evals": 500, "patience": None}
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), ("lamps",), training=training)
    cluster.have(1)
    state = tmp_path / "home.work/train/lamps/state.pt"

    def interrupt_when_saved() -> None:
        wait_for(state.exists, SAVED_WITHIN_S)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_saved, daemon=True).start()
    with pytest.raises(CancelledError, match="training on the cluster stopped; run the same command to resume"):
        build(recipe, tmp_path / "home", progress=QUIET, on_cluster=True)
    with FileLock(tmp_path / "home.work/cluster/lamps/lock", timeout=60):
        assert state.exists() and not (tmp_path / "home").exists()


def test_a_node_without_the_data_is_left_out(
    cluster: LocalCluster, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path / "data", tiny_gguf("llama"), NAMES[:1])
    # The other node is free once that node is left out, so that the training starts there first.
    busy = cluster.occupy(*cluster.have(1))

    class Freeing(Listening):
        def say(self, text: str) -> None:
            super().say(text)
            if "is left out" in text:
                cluster.ray.cancel(busy, force=True)

    with cluster.node_without(tmp_path / "data"):
        build(recipe, tmp_path / "home", progress=(listening := Freeing()), on_cluster=True)
    (line,) = [line for line in listening.lines if "is left out" in line]
    assert f"no data file {tmp_path}/data/" in line
    assert list(read_manifest(tmp_path / "home").adapters) == list(NAMES[:1])


def test_a_training_that_fails_is_named_and_the_next_build_gives_the_bundle_of_a_local_one(
    cluster: LocalCluster, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    cluster.have(2)
    recipe, listening = recipe_of(tmp_path, tiny_gguf("llama"), quantization="q4_0"), Listening()
    training = recipe.training.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 1e30})
    failing = recipe.adapters["lamps"].model_copy(update={"training": training})
    broken = recipe.model_copy(update={"adapters": {**recipe.adapters, "lamps": failing}})
    with pytest.raises(
        EdgetuneError, match=r"^adapter 'lamps' was not trained: the loss is \w+ at step \d; lower train"
    ):
        build(broken, tmp_path / "home", progress=listening, on_cluster=True)
    before = modified(tmp_path / "home.work/train/blinds")
    built = build(recipe, tmp_path / "home", progress=listening, on_cluster=True)
    assert modified(tmp_path / "home.work/train/blinds") == before
    assert [line for line in listening.lines if line.startswith("training ")] == [
        f"training {count} adapters on the cluster; cores for each: 1" for count in (2, 1)
    ]
    assert not any("loading the base" in line for line in listening.lines)
    local = build(recipe, tmp_path / "local", progress=QUIET)
    assert weights(tmp_path / "home") == weights(tmp_path / "local")
    assert results(tmp_path / "home") == results(tmp_path / "local")
    assert built.losses == local.losses
    verify_files(tmp_path / "home", read_manifest(tmp_path / "home"))
    before = modified(tmp_path / "home.work/train")
    build(recipe, tmp_path / "home", progress=(listening := Listening()), on_cluster=True)
    assert modified(tmp_path / "home.work/train") == before
    assert not any("on the cluster" in line for line in listening.lines), "what is trained already needs no node"


def test_trials_of_a_comparison_have_the_same_outcomes_as_here(
    cluster: LocalCluster, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    cluster.have(2)
    training = {"max_steps": 2, "evals": 1}
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), {"lights": adapter_of()}, training=training)
    settings = {"rslora.target_modules": "nothing_like_it"}
    request = grid.Request(recipe, "lights", ("lora", "rslora"), tmp_path / "out", (2,), None, settings)
    trials = grid.trials_of(request, grid.recipe_of(request), "ab")
    found = {outcome.name: outcome for outcome in run_on_ray(trials, QUIET)}
    assert {name: outcome.status for name, outcome in found.items()} == {"lora-r2": "done", "rslora-r2": "failed"}
    assert found["rslora-r2"].reason.startswith("adapter 'lights': the base has no module 'nothing_like_it'; ")
    lora = found["lora-r2"]
    assert lora == read_outcome(Path(trials[0].folder), trials[0].key)
    assert list(lora.engines) == ["gguf"]


def test_a_training_goes_on_elsewhere_when_its_node_dies(
    cluster: LocalCluster, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """The node has saved its training at a validation when it is killed; the other node goes on from there, as the
    time that it has taken so far shows."""
    training = {"max_steps": 120, "epochs": 1000, "evals": 12, "patience": None}
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), ("lamps",), training=training)
    first, second = cluster.have(2)
    busy = cluster.occupy(second)

    saved = tmp_path / "home.work/train/lamps/state.pt"

    def kill_when_saved() -> None:
        wait_for(saved.exists, SAVED_WITHIN_S)
        cluster.kill(first)
        with FileLock(tmp_path / "home.work/cluster/lamps/lock", timeout=60):
            state = torch.load(saved, weights_only=True)
            state["state"]["seconds"] += 1e6
            torch.save(state, saved)
        cluster.ray.cancel(busy, force=True)

    killing = threading.Thread(target=kill_when_saved, daemon=True)
    killing.start()
    listening = Listening()
    build(recipe, tmp_path / "home", progress=listening, on_cluster=True)
    killing.join()
    assert "lamps: its node died; it goes on elsewhere" in listening.lines
    assert read_manifest(tmp_path / "home").adapters["lamps"].training["seconds"] > 1e6
    build(recipe, tmp_path / "local", progress=QUIET)
    assert weights(tmp_path / "home") == weights(tmp_path / "local")
    assert results(tmp_path / "home") == results(tmp_path / "local")


def test_a_node_of_another_version_is_left_out(
    cluster: LocalCluster, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    cluster.have(0)
    other = tmp_path / "other/edgetune-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: edgetune\nVersion: 0.1\n", encoding="utf-8")
    cluster.add(env_vars={"PYTHONPATH": f"{other.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), NAMES[:1])
    with pytest.raises(IncompatibleError) as error:
        build(recipe, tmp_path / "home", progress=QUIET, on_cluster=True)
    what = rf"it has edgetune 0\.1; run there: pip install edgetune=={version('edgetune')}; add a node, or use"
    assert re.match(rf"no node of the cluster can run blinds: node \S+ \(\w+\) is left out: {what}", str(error.value))


def test_the_command_finds_the_cluster_and_reserves_a_gpu_if_there_is_one(
    cluster: LocalCluster,
    tiny_gguf: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster.have(0)
    cluster.add(2, num_gpus=1)
    recipe_of(tmp_path, tiny_gguf("llama"), NAMES[:1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster.cluster.address)
    with cluster.disconnected(), cluster.seen_free("GPU") as free_gpus:
        code = main(["build", "recipe.yaml", "--out", "home", "--engine", "ray", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "training 1 adapters on the cluster; GPUs for each: 1\nblinds: trained\n" in err
    assert list(json.loads(out)["adapters"]) == ["blinds"]
    assert free_gpus == {0, 1}
