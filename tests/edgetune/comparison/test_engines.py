from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgetune_runtime.errors import IncompatibleError
from recipes import adapter_of, write_recipe
from trainings import QUIET

from edgetune.comparison.engines import run_on_ray
from edgetune.comparison.figures import read_outcome
from edgetune.comparison.grid import Request, Trial, recipe_of, trials_of


@pytest.fixture
def two_workers() -> Iterator[None]:
    """A Ray of this machine with room for two trials."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def trials(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> list[Trial]:
    """lora, and an rslora that fails."""
    training = {"max_steps": 2, "evals": 1}
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), {"lights": adapter_of()}, training=training)
    settings = {"rslora.target_modules": "nothing_like_it"}
    request = Request(recipe, "lights", ("lora", "rslora"), tmp_path / "out", (2,), None, settings)
    return trials_of(request, recipe_of(request), "ab")


@pytest.mark.usefixtures("two_workers")
def test_trials_on_a_cluster_have_the_same_outcomes_as_here(trials: list[Trial]) -> None:
    found = {outcome.name: outcome for outcome in run_on_ray(trials, QUIET)}
    assert {name: outcome.status for name, outcome in found.items()} == {"lora-r2": "done", "rslora-r2": "failed"}
    assert found["rslora-r2"].reason.startswith("adapter 'lights': the base has no module 'nothing_like_it'; ")
    lora = found["lora-r2"]
    assert lora == read_outcome(Path(trials[0].folder), trials[0].key)
    assert list(lora.engines) == ["gguf"]


def test_without_ray_the_extra_is_named(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IncompatibleError, match=r'engine ray needs Ray; run: pip install "edgetune\[ray\]"'):
        list(run_on_ray(trials, QUIET))
