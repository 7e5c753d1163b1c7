"""Builds whose confidence is fitted on the answers of adapters that do not ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, read_manifest
from recipes import adapter_of, lights, make_recipe
from trainings import QUIET

from edgetune.building import builders
from edgetune.building.cross_fitting import fold_adapters
from edgetune.building.pipeline import build, export_trained
from edgetune.building.plan import plan_build
from edgetune.planning.records import PlannedBuild
from edgetune.recipe.model import Recipe
from edgetune.shipping.confidence import MAX_ROWS, shared_out
from edgetune.tasks.evaluation import score
from edgetune.tasks.folds import fold_tasks
from edgetune.tasks.task import read_task

COLORS = ("red", "warm", "blue")
METHOD = {"name": "lora", "r": 2, "lora_alpha": 32}
ROWS: dict[str, list[dict[str, Any]]] = {
    "command": lights(30, COLORS),
    "color": [{"text": f"turn on the light {n}", "label": COLORS[n % 3]} for n in range(30)],
    "whole": lights(30, COLORS),
}
FOLDS = {"held_out": 0.1, "draft": False, "confidence_folds": 2}
KEYS: dict[str, dict[str, Any]] = {
    # Trained until some answers are right.
    "command": {"training": {"max_steps": 40, "learning_rate": 1e-2}},
    "color": {"out_of_scope": {"label": "other", "refused": 0.25}},
    "whole": {"merged": True, "output": {"choices": list(COLORS)}},
}


@pytest.fixture(scope="module")
def bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in both formats, of adapters with folds."""
    folder = tmp_path_factory.mktemp("folds")
    adapters = {name: adapter_of(METHOD, train=f"{name}.jsonl", **FOLDS, **KEYS[name]) for name in ROWS}
    data = {f"{name}.jsonl": rows for name, rows in ROWS.items()}
    keys: dict[str, Any] = {"targets": ["gguf", "onnx"], "quantization": "q8_0", "training": {"evals": 1}}
    return build(
        make_recipe(folder, tiny_gguf("llama"), adapters, data=data, **keys), folder / "home", progress=QUIET
    ).bundle


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def test_the_adapters_of_folds_do_not_ship(bundle: Path, manifest: Manifest) -> None:
    assert list(manifest.adapters) == list(ROWS)
    assert sorted(path.name for path in (bundle / "adapters").iterdir()) == sorted(ROWS)
    assert all(entry.parity["gguf"] and entry.golden for entry in manifest.adapters.values())


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_all_rows_tell_how_sure_answers_are(engine: str, bundle: Path, manifest: Manifest) -> None:
    for name, kind in (("command", "value"), ("whole", "choice")):
        curve = manifest.adapters[name].confidence[engine][kind]
        assert (curve.rows, curve.slope is not None) == (30, True)
    recipe = Recipe.from_file(bundle.parent / "recipe.yaml")
    task = read_task("color", recipe)
    asked = [*task.confidence_rows, *(row for fold in fold_tasks(task, recipe) for row in fold.confidence_rows)]
    curves = manifest.adapters["color"].confidence[engine]
    assert sum(curve.rows for kind, curve in curves.items() if kind in ("label", "nothing")) == len(asked)
    scope = manifest.adapters["color"].scope[engine]
    assert (30 * scope.refused) == pytest.approx(round(30 * scope.refused), abs=0.01)


def test_the_rows_of_a_fold_are_answered_by_the_adapter_without_them(
    bundle: Path, manifest: Manifest, tmp_path: Path
) -> None:
    recipe = Recipe.from_file(bundle.parent / "recipe.yaml")
    task = read_task("command", recipe)
    parts = [task, *fold_tasks(task, recipe)]
    folders = {part.name: bundle.with_name("home.work") / "train" / part.name / "adapter" for part in parts}
    base = str(bundle / manifest.base.files["gguf"])
    again = export_trained(base, folders, tmp_path / "again", progress=QUIET)
    with Runtime.open(again.bundle, disk_mb=0) as runtime:
        right = [
            row.score for part in parts
            for row in score(runtime, part.name, part.confidence_rows, QUIET, "exact").details
        ]  # fmt: skip
    assert 0 < sum(right) < 30
    assert manifest.adapters["command"].confidence["gguf"]["value"].right == pytest.approx(sum(right) / 30, abs=1e-4)


def test_the_prefix_of_a_fold_begins_with_its_own_rows(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    method = {"name": "prefix", "num_virtual_tokens": 60}
    adapters = {"command": adapter_of(method, train="command.jsonl", **FOLDS)}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), adapters, data={"command.jsonl": ROWS["command"]})
    planned, builder = plan_build(recipe), builders.load(recipe.task)
    base = builder.base_to_train(planned, tmp_path / "work", QUIET, None)
    prepared = builder.prepare(planned, base, tmp_path / "work", QUIET)
    folds = fold_adapters(builder, planned.plan, prepared, base)
    assert [item.plan.name for item in folds] == ["command~1", "command~2"]
    for item in (*prepared.adapters, *folds):
        tokens = [token for row in item.job.train for token in row.tokens]
        assert item.job.options.init_tokens == tuple(tokens[:60])


def test_folds_have_the_modules_that_a_build_chose_for_an_activated_lora(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    def planned_with(target_modules: object) -> PlannedBuild:
        method = {"name": "alora", "target_modules": target_modules, "r": 2}
        adapters = {"command": adapter_of(method, train="command.jsonl", **FOLDS)}
        return plan_build(make_recipe(tmp_path, tiny_gguf("llama"), adapters, data={"command.jsonl": ROWS["command"]}))

    planned, chosen = planned_with("auto"), planned_with(["q_proj"])
    builder = builders.load(planned.plan.recipe.task)
    base = builder.base_to_train(planned, tmp_path / "work", QUIET, None)
    prepared = builder.prepare(chosen, base, tmp_path / "work", QUIET)
    folds = fold_adapters(builder, planned.plan, prepared, base)
    assert [item.job.options for item in folds] == [prepared.adapters[0].job.options] * 2


@pytest.mark.parametrize("held_out", [0.01, 0.1])
def test_each_part_of_many_rows_is_asked(held_out: float, tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "held_out": held_out}
    adapter = {"data": data, "confidence_folds": 2, "metric": "label", "out_of_scope": True}
    rows = [{"text": f"turn on the light {n}", "label": COLORS[n % 3]} for n in range(600)]
    recipe = make_recipe(tmp_path, "base", {"color": adapter}, data={"rows.jsonl": rows})
    task = read_task("color", recipe)
    parts = [task, *fold_tasks(task, recipe)]
    counts = [len(rows) for rows in shared_out({part.name: part.confidence_rows for part in parts}).values()]
    assert len(counts) == 3 and min(counts) > 0 and sum(counts) <= MAX_ROWS + 3


def test_a_confidence_is_given_though_three_rows_are_held_out(bundle: Path) -> None:
    with Runtime.open(bundle, disk_mb=0) as runtime:
        assert runtime.classify("turn on the light 7", adapter="color").confidence is not None
        assert runtime.generate("turn on the light 7", adapter="whole").confidence is not None
