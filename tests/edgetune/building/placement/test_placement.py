from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_devices import boards, fit
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.engines.needs import AdapterSize
from edgetune_runtime.errors import UsageError
from pydantic import ValidationError
from recipes import LIGHTS, PLAIN, adapter_of, make_recipe
from trainings import QUIET, Listening

from edgetune import bases, methods
from edgetune.bases import Base
from edgetune.building.pipeline import build
from edgetune.building.placement.cost import ATTENTION, MLP, costs, placements
from edgetune.common.progress import Progress
from edgetune.planning.adapters import plan_adapters
from edgetune.planning.on_device import bundle_needs
from edgetune.planning.records import AdapterPlan
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_of


@dataclass(frozen=True)
class Built:
    """What a build with `target_modules: auto` gave and said."""

    recipe: Recipe
    bundle: Path
    figures: Mapping[str, Any]
    lines: list[str]


def recipe_of(folder: Path, base: Path, budget: object, rank: int = 2, **keys: object) -> Recipe:
    method = {"name": "lora", "r": rank, "target_modules": "auto", "max_decode_overhead": budget}
    return make_recipe(folder, base, {"command": adapter_of(method, **PLAIN)}, training={"max_steps": 8}, **keys)


def planned(recipe: Recipe) -> AdapterPlan:
    return plan_adapters(recipe, shapes_of(recipe), bases.find(recipe))["command"]


def tried(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(figures["placement"]["tried"])


def figures_of(recipe: Recipe, out: Path, progress: Progress = QUIET) -> Mapping[str, Any]:
    result = build(recipe, out, progress=progress)
    return result.figures["command"]


@pytest.fixture(scope="module")
def built(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("placed")
    recipe, progress = recipe_of(folder, tiny_gguf("llama"), "100%"), Listening()
    figures = figures_of(recipe, folder / "home", progress)
    return Built(recipe, folder / "home", figures, progress.lines)


def test_the_placement_with_the_least_trial_loss_is_chosen(built: Built) -> None:
    chosen, all_of_them = built.figures["placement"], tried(built.figures)
    assert [item["r"] for item in all_of_them] == [1, 2] * 7
    trained = [item for item in all_of_them if item["val_loss"] is not None]
    assert [item["r"] for item in trained] == [2] * 7
    assert chosen["val_loss"] == min(item["val_loss"] for item in trained)
    assert len({item["val_loss"] for item in trained}) == 7
    assert {key: chosen[key] for key in all_of_them[0]} in trained
    assert all(0 <= item["cost"] < 1 for item in all_of_them)
    assert (chosen["max_decode_overhead"], chosen["steps"]) == (1.0, 4)


def test_the_chosen_placement_is_trained_and_runs(built: Built) -> None:
    manifest = read_manifest(built.bundle)
    chosen, entry = built.figures["placement"], manifest.adapters["command"]
    names = (*ATTENTION, *MLP) if chosen["target_modules"] == "all-linear" else chosen["target_modules"]
    assert entry.modules_by_rank == {chosen["r"]: len(names) * manifest.base.layers}
    assert entry.training["placement"] == chosen
    with Runtime.open(built.bundle) as runtime:
        question = LIGHTS[0]["prompt"]
        answers = {runtime.generate(question, adapter=name, max_tokens=8).text for name in (None, "command")}
    assert len(answers) == 2


def test_the_bundles_recipe_names_what_was_chosen(built: Built) -> None:
    chosen, resolved = built.figures["placement"], read_manifest(built.bundle).recipe
    assert "auto" not in json.dumps(resolved["adapters"]["command"]["method"])
    method = Recipe.model_validate(resolved).adapters["command"].method.options.model_dump(mode="json")
    assert (method["target_modules"], method["r"]) == (chosen["target_modules"], chosen["r"])
    # As much as alpha 32 at rank 2.
    assert method["lora_alpha"] / method["r"] == 16


def test_the_build_prints_a_table_of_the_placements(built: Built) -> None:
    start = next(number for number, line in enumerate(built.lines) if "command: modules and rank for" in line)
    table = built.lines[start + 1 : start + 8]
    assert "measured here with gguf" in built.lines[start]
    for line, name in zip(table, ("o_proj", "down_proj", "v_proj", "q_proj, v_proj", "attention", "MLP"), strict=False):
        assert line.startswith(f"  {name} ")
        assert "rank 2 " in line
        assert "validation loss" in line
        assert "after 4 steps" in line
    assert [line.endswith("<- chosen") for line in table].count(True) == 1


def test_a_resumed_build_keeps_the_placement_that_was_chosen(built: Built) -> None:
    work = built.bundle.with_name("home.work") / "placement"
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert not (work / "bench").exists()
    progress = Listening()
    again = figures_of(built.recipe, built.bundle, progress)
    assert again["placement"] == built.figures["placement"]
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == kept
    assert not any(line.startswith(("measuring", "loading")) for line in progress.lines)


def test_a_resumed_build_keeps_costs_that_were_measured(
    tiny_gguf: Callable[[str], Path], tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), "100%")
    base = tiny_base("llama")
    plan = planned(recipe)
    wanted = placements(4)[:6]
    first = costs(wanted[:3], plan, base, recipe, folder=tmp_path, progress=QUIET)
    both = costs(wanted, plan, base, recipe, folder=tmp_path, progress=QUIET)
    assert {placement: both.by_placement[placement] for placement in wanted[:3]} == first.by_placement
    (file,) = tmp_path.glob("costs-*.json")
    file.write_bytes(file.read_bytes()[:20])
    assert set(costs(wanted, plan, base, recipe, folder=tmp_path, progress=QUIET).by_placement) == set(wanted)


def test_a_budget_that_no_placement_meets_is_refused_with_the_cheapest_one(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        figures_of(recipe_of(tmp_path, tiny_gguf("llama"), "0%", rank=1), tmp_path / "home")
    message = str(caught.value)
    (file,) = (tmp_path / "home.work" / "placement").glob("costs-*.json")
    measured = json.loads(file.read_bytes())["costs"]
    title = min(measured, key=measured.__getitem__).removesuffix("-r1").replace("+", ", ").replace("mlp", "MLP")
    assert f"the cheapest, {title} at rank 1, costs {min(measured.values()):.1%} (measured here with gguf)" in message
    assert "set max_decode_overhead: " in message
    assert "\n" not in message
    assert not (tmp_path / "home").exists()


def test_a_boards_model_tells_the_costs_without_an_engine(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    base, progress = tiny_base("llama"), Listening()
    recipe = recipe_of(tmp_path, base.path, "10%", device="pi-5")
    wanted = placements(16)
    found = costs(wanted, planned(recipe), base, recipe, folder=tmp_path / "none", progress=progress)
    cost = {placement.key: share for placement, share in found.by_placement.items()}
    assert cost["o_proj-r4"] < cost["o_proj-r8"] < cost["o_proj-r16"] < cost["attention-r4"] < cost["all-linear-r4"] < 1
    board, needs = boards.load("pi-5"), bundle_needs(recipe, {}, base.header, None)
    # A in f16 and B in f32, in two layers.
    size = AdapterSize(2 * 8 * (2 * 64 + 4 * 32), 2)
    predicted = fit.fit(replace(needs, adapters={"command": size}), board)
    assert cost["v_proj-r8"] == 1 - predicted.speed.adapter_tokens_per_s / predicted.speed.decode_tokens_per_s
    assert progress.lines == []
    assert not (tmp_path / "none").exists()


def test_onnx_is_measured_on_graphs_of_the_placements_own(
    tiny_gguf: Callable[[str], Path], tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), "100%", targets=["onnx"])
    wanted = [placement for placement in placements(1) if placement.target_modules == ("v_proj",)]
    base = tiny_base("llama")
    found = costs(wanted, planned(recipe), base, recipe, folder=tmp_path, progress=QUIET).by_placement
    assert set(found) == set(wanted)
    assert all(0 <= cost < 1 for cost in found.values())
    assert not (tmp_path / "bench").exists()


def test_a_single_placement_that_fits_needs_no_trial(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    keys: dict[str, Any] = {"rank": 1, "device": "pi-5", "context_length": 64}
    recipe = recipe_of(tmp_path, base.path, "100%", **keys)
    cost = costs(placements(1), planned(recipe), base, recipe, folder=tmp_path, progress=QUIET).by_placement
    cheapest, next_one = sorted(placements(1), key=cost.__getitem__)[:2]
    between = (cost[cheapest] + cost[next_one]) / 2
    progress = Listening()
    chosen = figures_of(recipe_of(tmp_path, base.path, between, **keys), tmp_path / "home", progress)["placement"]
    assert (tuple(chosen["target_modules"]), chosen["val_loss"], chosen["steps"]) == (cheapest.target_modules, None, 0)
    assert chosen["costs"] == "predicted for pi-5"
    assert [line.endswith("over the budget") for line in progress.lines].count(True) == 6
    (line,) = [line for line in progress.lines if line.endswith("<- chosen")]
    assert cheapest.title in line
    assert not list((tmp_path / "home.work" / "placement").glob("*"))


def test_a_board_is_asked_for_room_for_the_largest_placement(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = tiny_base("llama")
    auto = recipe_of(tmp_path, base.path, "10%")
    spec = auto.adapters["command"]
    method = spec.method.model_copy(update={"options": methods.load("lora").options(r=2)})
    whole = auto.model_copy(update={"adapters": {"command": spec.model_copy(update={"method": method})}})
    sizes = [bundle_needs(recipe, {"command": planned(recipe)}, base.header, None).adapters for recipe in (auto, whole)]
    assert sizes[0] == sizes[1]
    assert sizes[0]["command"].modules == 14


@pytest.mark.parametrize(("written", "share"), [("10%", 0.1), (" 2.5 % ", 0.025), (0.2, 0.2), ("0.2", 0.2), (1, 1.0)])
def test_a_share_is_written_as_percentage_or_number(written: object, share: float) -> None:
    assert methods.load("lora").options(max_decode_overhead=written).max_decode_overhead == pytest.approx(share)


@pytest.mark.parametrize("written", ["ten%", "101%", -0.1, 10, "nan%", ""])
def test_an_invalid_share_is_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        methods.load("lora").options(max_decode_overhead=written)


@pytest.mark.parametrize(
    ("top", "adapter", "options", "message"),
    [
        ({"task": "text-classification"}, {}, {}, "target_modules: auto does not work for an encoder"),
        ({}, {"merged": True}, {}, "target_modules: auto does not work with merged: true; name the modules"),
        ({}, {"start_from": "a"}, {}, "target_modules: auto does not work with start_from; name the modules"),
        (
            {},
            {},
            {"rank_pattern": {"q_proj": 2}},
            "target_modules: auto uses one rank for all modules; remove rank_pattern",
        ),
        ({}, {}, {"name": "dora"}, "dora has no target_modules: auto; list modules or use all-linear"),
        ({}, {}, {"name": "ia3"}, "ia3 has no target_modules: auto; list modules or use all-linear"),
    ],
)
def test_automatic_modules_are_refused_with_what_excludes_them(
    top: dict[str, Any], adapter: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    method = {"name": "lora", "target_modules": "auto", **options}
    with pytest.raises(UsageError) as caught:
        make_recipe(tmp_path, "smollm2-135m", {"command": adapter_of(method, **adapter)}, **top)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
