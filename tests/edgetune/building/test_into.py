from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import UnsureRule, read_manifest, sha256_of, verify_files
from edgetune_runtime.errors import EdgetuneError, UsageError, VerificationError
from edgetune_runtime.inference import golden
from edgetune_runtime.inference.bundle_files import remove_from_bundle
from recipes import NAME, adapter_of, lights, make_recipe
from runtime.bundles import add_router, change_manifest
from trainings import QUIET, Listening, modified

from edgetune.building.into import router_change
from edgetune.building.pipeline import build, export_trained
from edgetune.cli.main import main
from edgetune.recipe.model import Recipe
from edgetune.shipping.existing import ExistingBundle

LORA = {"name": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]}
COMPLETIONS = {"plain": "reply on", "scaled": "set red", "blinds": "close the blind"}
SETTINGS: dict[str, Any] = {"quantization": "q4_0", "targets": ["gguf", "onnx"], "context_length": 128}


def recipe_of(folder: Path, base: Path, *names: str, adapter: Mapping[str, Any] | None = None, **keys: Any) -> Recipe:  # noqa: ANN401 - of the recipe
    """A recipe of these adapters, each with rows of its own; `adapter` has changes to all of them."""
    rows = {name: lights(completions=(COMPLETIONS[name],)) for name in names}
    data = {f"{name}.jsonl": [{**row, "prompt": f"{name} {row['prompt']}"} for row in rows[name]] for name in names}
    adapters = {name: adapter_of(**{"method": LORA, "train": f"{name}.jsonl", **(adapter or {})}) for name in names}
    return make_recipe(folder, base, adapters, data=data, **keys)


def digests(bundle: Path, *parts: str) -> dict[str, str]:
    """The sha256 of the files whose paths in the bundle begin with one of `parts`."""
    files = [path for path in bundle.rglob("*") if path.is_file()]
    names = {path.relative_to(bundle).as_posix(): path for path in files}
    return {name: sha256_of(path) for name, path in names.items() if name.startswith(parts)}


@pytest.fixture(scope="module")
def whole(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two adapters in two formats, with its work folder."""
    folder = tmp_path_factory.mktemp("whole")
    build(recipe_of(folder, tiny_gguf("llama"), "plain", "scaled", **SETTINGS), folder / "home", progress=QUIET)
    return folder / "home"


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for name in ("home", "home.work"):
        shutil.copytree(whole.with_name(name), tmp_path / name)
    return tmp_path / "home"


def test_an_adapter_is_added_and_one_replaced_and_the_others_stay_byte_for_byte(
    home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    router = add_router(home, {"generate": {"plain": "on", "scaled": "red"}})
    before, kept = read_manifest(home), digests(home, "base/", "adapters/plain/", router.file)
    recipe = recipe_of(tmp_path / "more", tiny_gguf("llama"), "blinds", "scaled", adapter={"scale": 0.5}, name="more")
    listening = Listening()
    built = build(recipe, home, progress=listening, into=True)
    manifest = read_manifest(home)
    verify_files(home, manifest)
    assert list(built.figures) == ["blinds", "scaled"]
    assert not any(line.startswith(("quantizing", "writing base", "plain")) for line in listening.lines)
    assert digests(home, "base/", "adapters/plain/", router.file) == kept
    stays = (
        "router: stays as it is, and never chooses blinds; to train it again, give the recipe route and all adapters"
    )
    assert manifest.router == router and stays in listening.lines
    assert (manifest.name, manifest.base, manifest.context_length) == ("home", before.base, 128)
    assert manifest.adapters["plain"] == before.adapters["plain"]
    assert list(manifest.adapters) == ["plain", "scaled", "blinds"]
    assert {name: entry.scale for name, entry in manifest.adapters.items()} == {
        "plain": 1,
        "scaled": 0.5,
        "blinds": 0.5,
    }
    assert all(set(entry.golden) == {"gguf", "onnx"} for entry in manifest.adapters.values())
    assert "blinds" in (home / "README.md").read_text(encoding="utf-8")
    for engine in ("gguf", "onnx"):
        with Runtime.open(home, engine=engine) as runtime:
            assert not any(comparison.is_different for _, comparison in golden.compare(runtime))


def test_the_recipe_the_plan_and_the_fit_in_the_manifest_are_those_of_all_adapters(
    home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(home, lambda raw: raw["recipe"].update(device="pi-5"))
    before = read_manifest(home)
    more = recipe_of(tmp_path / "more", tiny_gguf("llama"), "blinds", training={"max_steps": 4})
    assert main(["plan", str(tmp_path / "more" / NAME), "--into", str(home), "--json"]) == 0
    # A bundle's own adapters have no rows here that say what their metric is.
    planned = json.loads(capsys.readouterr().out)["adapters"]
    assert {name: each["metric"] for name, each in planned.items()} == {
        "plain": None,
        "scaled": None,
        "blinds": "exact",
    }
    build(more, home, progress=QUIET, into=True)
    manifest = read_manifest(home)
    adapters = manifest.recipe["adapters"]
    assert {key: value for key, value in manifest.recipe.items() if key != "adapters"} == {
        key: value for key, value in before.recipe.items() if key != "adapters"
    }
    assert list(adapters) == ["plain", "scaled", "blinds"]
    assert (adapters["blinds"]["training"]["max_steps"], manifest.recipe["training"]["max_steps"]) == (4, 6)
    assert Recipe.model_validate(json.loads(json.dumps(manifest.recipe))).resolved() == manifest.recipe
    plans = manifest.plan["adapters"]
    assert {name: plan["rows"]["train"] for name, plan in plans.items()} == {"plain": 8, "scaled": 8, "blinds": 8}
    assert plans["plain"] == before.plan["adapters"]["plain"]
    assert manifest.plan["needs"]["bundle_mb"] >= before.plan["needs"]["bundle_mb"]
    for fit in manifest.plan["board"]["fits"]:
        names = {item["name"] for item in fit["items"]}
        assert {"adapter plain", "adapter scaled", "adapter blinds"} <= names


def test_an_interrupted_build_leaves_the_bundle_and_resumes(
    home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    before = modified(home)
    recipe = recipe_of(tmp_path / "more", tiny_gguf("llama"), "blinds", "scaled")
    for stop in ("blinds: validation loss", "writing onnx", "storing a golden answer"):
        with pytest.raises(KeyboardInterrupt):
            build(recipe, home, progress=Listening(stop_at=stop), into=True)
        assert modified(home) == before
    trained = modified(home.with_name("home.work") / "train")
    build(recipe, home, progress=QUIET, into=True)
    assert modified(home.with_name("home.work") / "train") == trained
    assert list(read_manifest(home).adapters) == ["plain", "scaled", "blinds"]


def test_the_base_in_the_bundle_is_enough(home: Path, tmp_path: Path) -> None:
    shutil.rmtree(home.with_name("home.work"))
    base = home / read_manifest(home).base.files["gguf"]
    listening = Listening()
    build(recipe_of(tmp_path / "more", base, "blinds"), home, progress=listening, into=True)
    assert not any(line.startswith("quantizing") for line in listening.lines)
    assert read_manifest(home).base.quantization == read_manifest(home).recipe["quantization"] == "q4_0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "q8_0"}, "quantization is q8_0, but {home} has q4_0; remove it from the recipe"),
        ({"targets": ["gguf"]}, "targets is [gguf], but {home} has [gguf, onnx]; remove it from the recipe"),
        ({"context_length": 64}, "context_length is 64, but {home} has 128; remove it from the recipe"),
        ({"device": "pi-5"}, "device is pi-5, but {home} has none; remove it from the recipe"),
        (
            {"domain": {"data": {"train": "a.txt"}}},
            "domain would train the base of {home} again; set base: {home}/base/llama.q4_0.gguf, or leave out domain",
        ),
        ({"base": "qwen3"}, "has sha256 "),
        (
            {"imatrix": "auto", "quantization": "q4_0"},
            "imatrix of these rows would make another base than that of {home}; set base: {home}/base/llama.q4_0.gguf",
        ),
        (
            {"adapter": {"method": {"name": "lora", "target_modules": ["o_proj"]}}},
            "no slot for model.layers.0.self_attn.o_proj",
        ),
    ],
)
def test_another_setting_is_one_line_before_any_training(
    changes: dict[str, Any], message: str, home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    before, keys = modified(home), dict(changes)
    recipe = recipe_of(tmp_path / "more", tiny_gguf(keys.pop("base", "llama")), "blinds", **keys)
    with pytest.raises(EdgetuneError) as error:
        build(recipe, home, progress=QUIET, into=True)
    assert message.format(home=home) in str(error.value)
    assert "\n" not in str(error.value)
    assert modified(home) == before
    assert not (home.with_name("home.work") / "train" / "blinds").exists()


def test_a_name_with_another_meaning_for_the_router_is_refused(
    home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    add_router(home, {"generate": {"plain": "on", "scaled": "red"}})
    recipe = recipe_of(tmp_path / "more", tiny_gguf("llama"), "blinds")
    named = recipe.model_copy(update={"adapters": {"error": recipe.adapters["blinds"]}})
    with pytest.raises(UsageError, match=r"'error' cannot be a name in .*home, whose router has another meaning"):
        build(named, home, progress=QUIET, into=True)


def test_a_recipe_of_all_adapters_trains_the_router_again(
    home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    add_router(home, {"generate": {"plain": "on", "scaled": "red"}})
    before, folder, base = modified(home), tmp_path / "more", tiny_gguf("llama")
    work = home.with_name("home.work") / "train"
    trained = modified(work)
    lacking = rf"route would train a router without plain, of which the recipe has no rows; add what {home} has to its"
    with pytest.raises(UsageError, match=lacking):
        build(recipe_of(folder, base, "scaled", "blinds", route=True), home, progress=QUIET, into=True)
    recipe = recipe_of(folder, base, "plain", "scaled", "blinds", route=True)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, home, progress=Listening(stop_at="router: generate"), into=True)
    assert modified(home) == before
    build(recipe, home, progress=QUIET, into=True)
    assert trained.items() <= modified(work).items()
    manifest = read_manifest(home)
    verify_files(home, manifest)
    assert Recipe.model_validate(manifest.recipe).route == recipe.route
    with Runtime.open(home) as runtime:
        chosen = [runtime.route(f"{name} turn on the light 3").adapter for name in manifest.adapters]
    assert chosen == ["plain", "scaled", "blinds"]


def test_a_router_says_which_adapter_it_no_longer_chooses(tmp_path: Path, home: Path) -> None:
    add_router(home, {"generate": {"plain": "on", "scaled": "red"}})
    recipe = recipe_of(tmp_path / "more", home, "plain", "blinds", route={"adapters": ["plain", "blinds"]})
    existing = ExistingBundle.read(home, recipe.adapters, replaces_router=True)
    assert router_change(recipe, existing) == "router: no longer chooses scaled, not in route.adapters"


def test_a_damaged_bundle_gets_no_new_digests(home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    file = home / read_manifest(home).adapters["plain"].files["gguf"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(VerificationError, match=r"adapters/plain/adapter\.gguf does not match its digest"):
        build(recipe_of(tmp_path / "more", tiny_gguf("llama"), "blinds"), home, progress=QUIET, into=True)


@pytest.mark.parametrize("when", ["writing gguf", "storing a golden answer"])
def test_a_bundle_that_changes_during_the_build_is_left_alone(
    when: str, home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    class Changing(Listening):
        def say(self, text: str) -> None:
            if text.startswith(when) and "scaled" in read_manifest(home).adapters:
                remove_from_bundle(home, "scaled")

    with pytest.raises(VerificationError, match="home was changed while adapters were built for it; run the same"):
        build(recipe_of(tmp_path / "more", tiny_gguf("llama"), "blinds"), home, progress=Changing(), into=True)
    assert list(read_manifest(home).adapters) == ["plain"]


def test_states_are_shipped_for_all_adapters_again(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"adapter": {"system": "play"}, "quantization": "q8_0"}
    first = recipe_of(tmp_path / "data", tiny_gguf("llama"), "plain", states="ship", **keys)
    build(first, tmp_path / "home", progress=QUIET)
    before = len(digests(tmp_path / "home", "states/"))
    build(
        recipe_of(tmp_path / "data", tiny_gguf("llama"), "blinds", **keys), tmp_path / "home", progress=QUIET, into=True
    )
    verify_files(tmp_path / "home", read_manifest(tmp_path / "home"))
    assert len(digests(tmp_path / "home", "states/")) == before + 1 > 1


def test_an_adapter_joins_those_that_were_trained_elsewhere(
    home: Path, tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = home.with_name("home.work") / "train" / "plain" / "adapter", tmp_path / "exported"
    export_trained(str(tiny_gguf("llama")), {"theirs": folder}, out, progress=QUIET)
    adapter = adapter_of(LORA, train="rows.jsonl", confidence_folds=2, min_confidence=0.5, unsure="theirs")
    data = {"rows.jsonl": lights(20, (COMPLETIONS["blinds"],))}
    recipe = make_recipe(tmp_path / "more", tiny_gguf("llama"), {"blinds": adapter}, data=data, threads=None)
    plan = ["plan", str(tmp_path / "more" / NAME)]
    # Only the bundle has the adapter that answers in place of unsure answers.
    assert main(plan) == 2
    capsys.readouterr()
    assert main([*plan, "--into", str(out), "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)["adapters"]] == ["blinds"]
    build(recipe, out, progress=QUIET, into=True)
    manifest = read_manifest(out)
    verify_files(out, manifest)
    assert manifest.adapters["blinds"].unsure == UnsureRule(0.5, "theirs", "")
    assert (list(manifest.adapters), list(manifest.recipe["adapters"])) == (["theirs", "blinds"], ["blinds"])
