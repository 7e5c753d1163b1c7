"""Bundles of tiny bases, whose adapters are trained again on another base and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.errors import EdgetuneError, NotFoundError
from recipes import PLAIN, adapter_of, lights, make_recipe, values_of, write_rows
from trainings import QUIET

import edgetune
from edgetune.building.pipeline import build
from edgetune.cli.main import main
from edgetune.retraining.learning.kept import adapter_folders, recipe_beside
from edgetune.retraining.rebasing.recipe import RecipeSource, recipe_for

TRAINING = {"max_steps": 30, "evals": 2, "learning_rate": 1e-2}
DATA: dict[str, list[dict[str, Any]]] = {
    "light.jsonl": lights(24),
    "tone.csv": [
        {"text": f"make the lamp {color} {n}", "label": color} for n in range(12) for color in ("red", "warm")
    ],
    "test.jsonl": [{"prompt": f"switch on the light {n}", "completion": "reply on"} for n in range(3)],
}
ADAPTERS: dict[str, Any] = {
    "light": adapter_of(train="light.jsonl", **PLAIN),
    "tone": adapter_of(train="tone.csv", **PLAIN),
}
# An adapter that is left as it starts: as bad as the base alone.
UNTRAINED = "adapters.light.training={max_steps: 1, learning_rate: 1.0e-9}"


@pytest.fixture(scope="module")
def built(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe and of its bundle, `home`, on a LLaMA, whose adapters answer all their rows rightly."""
    folder = tmp_path_factory.mktemp("rebase")
    recipe = make_recipe(folder, tiny_gguf("llama"), ADAPTERS, data=DATA, training=TRAINING)
    build(recipe, folder / "home", progress=QUIET)
    return folder


@pytest.fixture
def home(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle in the current folder, which has the files of its rows too."""
    for name in DATA:
        shutil.copy(built / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(built / "home", tmp_path / "home"))


def run(home: Path, *options: object) -> int:
    return main(["rebase", str(home), *map(str, options), "--quiet"])


def test_adapters_are_trained_again_on_another_architecture(
    home: Path, tiny_gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_manifest(home)
    page = home.with_name("page.html")
    assert run(home, "--base", tiny_gguf("qwen2"), "--data", "light=test.jsonl", "--page", page, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    out = home.with_name("home-rebased")
    assert (result["bundle"], result["left_out"]) == (str(out), [])
    assert {name: {*sets} for name, sets in result["adapters"].items()} == {
        "light": {"validation", "test"}, "tone": {"validation"},
    }  # fmt: skip
    test = result["adapters"]["light"]["test"]
    assert (test["before"], test["after"], test["rows"], test["is_worse"]) == (1.0, 1.0, 3, False)
    assert test["before_ms"] > 0 and test["after_ms"] > 0
    assert result["after"]["base"] == "qwen2.gguf" and result["after"]["adapters_mb"].keys() == ADAPTERS.keys()
    after = read_manifest(out)
    assert (before.base.architecture, after.base.architecture) == ("llama", "qwen2")
    assert after.recipe["adapters"] == before.recipe["adapters"]
    assert read_manifest(home) == before
    with Runtime.open(out, disk_mb=0) as runtime:
        assert runtime.generate("turn on the light 1", adapter="light", max_tokens=8).text == "reply on"
        assert runtime.classify("make the lamp warm 3", adapter="tone").label == "warm"
    text = page.read_text(encoding="utf-8")
    assert "<h1>home on qwen2.gguf</h1>" in text and "no adapter got worse by more than one standard error" in text
    assert "<td>MB of tone</td>" in text and "<script" not in text


def test_another_tokenizer_and_template_change_nothing_in_the_rows(
    home: Path, tiny_gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_gguf("hunyuan_dense")
    old = read_manifest(home).base
    assert run(home, "--base", base, "--out", home, "--margin", "inf") == 0
    assert "packed" in capsys.readouterr().out
    new = read_manifest(home).base
    assert new.chat_template_sha256 != old.chat_template_sha256 and new.tokenizer_sha256 != old.tokenizer_sha256
    with Runtime.open(home, disk_mb=0) as runtime:
        assert runtime.generate("turn on the light 1", adapter="light", max_tokens=8).text == "reply on"
    # The next `learn` or `rebase` finds the recipe and the adapters.
    recipe = recipe_beside(home, ADAPTERS)
    assert recipe is not None and recipe.base == str(base)
    assert len(adapter_folders(home, "light")) == 1


def test_nothing_is_packed_if_an_adapter_got_worse_unless_it_is_left_out_or_any_loss_is_allowed(
    home: Path, tiny_gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = home.with_name("new")
    options = "--base", tiny_gguf("qwen2"), "--out", out, "--set", UNTRAINED
    assert run(home, *options) == 4
    said = capsys.readouterr()
    assert said.err.strip().splitlines() == [
        "edgetune: worse on the new base: light on validation; nothing was packed; allow more with --margin, or leave "
        "these adapters out with --without-worse"
    ]
    assert "nothing packed" in said.out and not out.exists() and not out.with_name("new.learn").exists()
    trained = home.with_name("new.rebase") / "new.work/train/tone/log.jsonl"
    written = trained.stat().st_mtime_ns
    assert run(home, *options, "--without-worse") == 0
    assert "left out, because they got worse: light" in capsys.readouterr().out
    assert set(read_manifest(out).adapters) == {"tone"}
    assert trained.stat().st_mtime_ns == written, "the training was done again"
    with Runtime.open(out, disk_mb=0) as runtime:
        assert runtime.classify("make the lamp red 3", adapter="tone").label == "red"
    shutil.rmtree(out)
    settings = {"adapters.light.training": {"max_steps": 1, "learning_rate": 1e-9}}
    result = edgetune.rebase(home, tiny_gguf("qwen2"), out, settings=settings, margin=float("inf"))
    assert result.bundle == out and not result.worse
    assert result.changes["light"]["validation"].after < result.changes["light"]["validation"].before
    assert set(read_manifest(result.bundle).adapters) == {"light", "tone"}


def test_another_quantization_of_the_same_base(built: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "--quantization", "q8_0", "--recipe", built / "recipe.yaml", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["quantization"] == "q8_0"
    assert result["after"]["base_mb"] < result["before"]["base_mb"]
    assert read_manifest(Path(result["bundle"])).base.quantization == "q8_0"


def test_texts_are_compared_in_bits_per_byte(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"rows.jsonl": [{"text": f"turn on the light in the hall {n}"} for n in range(10)]}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), {"talk": adapter_of(**PLAIN)}, data=data)
    build(recipe, tmp_path / "home", progress=QUIET)
    path = tmp_path / "recipe.yaml"
    assert run(tmp_path / "home", "--base", tiny_gguf("hunyuan_dense"), "--recipe", path, "--margin", "inf") == 0
    assert "bits/byte" in capsys.readouterr().out


def test_encoders_are_exchanged_too(
    tiny_encoder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = {"tone": adapter_of(train="tone.csv", confidence=False, golden=False)}
    recipe = make_recipe(
        tmp_path, tiny_encoder("bert"), adapters, data=DATA, training=TRAINING, task="text-classification"
    )
    build(recipe, tmp_path / "home", progress=QUIET)
    path = tmp_path / "recipe.yaml"
    assert run(tmp_path / "home", "--base", tiny_encoder("distilbert"), "--recipe", path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["before"]["base"], result["after"]["base"]) == ("bert", "distilbert")
    assert result["adapters"]["tone"]["validation"]["after"] == 1.0


def test_token_ids_and_starts_of_the_old_base_are_left_out(home: Path, tiny_gguf: Callable[[str], Path]) -> None:
    methods: Mapping[str, Any] = {
        "light": {"name": "prefix", "init_text": "turn on", "init_tokens": [5, 6]},
        "tone": {"name": "alora", "invocation_tokens": [7]},
    }
    manifest = read_manifest(home)
    old = manifest.recipe["adapters"]
    for name, method in methods.items():
        old[name]["method"] = method
    recipe = recipe_for(home, manifest, RecipeSource(str(tiny_gguf("qwen2"))))
    light, tone = (recipe.adapters[name].method.options for name in methods)
    assert (light.init_text, light.init_tokens) == ("turn on", ()) and tone.invocation_tokens == ()
    assert light.num_virtual_tokens == 20
    old["light"]["method"] = {"name": "lora"}
    old["light"]["start_from"] = "home.work/train/light/adapter"
    recipe = recipe_for(home, manifest, RecipeSource(str(tiny_gguf("qwen2"))))
    assert recipe.adapters["light"].start_from is None


def test_paths_in_the_bundle_start_in_the_folder(
    home: Path, tiny_gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    recipe = recipe_for(home, read_manifest(home), RecipeSource(str(tiny_gguf("qwen2")), folder=home.parent))
    assert recipe.adapters["light"].data.train == str(home.with_name("light.jsonl"))
    with pytest.raises(
        NotFoundError, match=r"light\.jsonl \(light\); tone\.csv \(tone\); copy them there, or give the folder"
    ):
        recipe_for(home, read_manifest(home), RecipeSource(str(tiny_gguf("qwen2"))))


def test_rows_can_be_in_memory(home: Path, tiny_gguf: Callable[[str], Path]) -> None:
    manifest, base = read_manifest(home), str(tiny_gguf("qwen2"))
    adapters = {name: adapter_of(train=lights(), held_out=0.5) for name in manifest.adapters}
    given = edgetune.Recipe.from_dict(values_of(tiny_gguf("llama"), adapters))
    recipe = recipe_for(home, manifest, RecipeSource(base, recipe=given))
    for name, spec in recipe.adapters.items():
        assert spec.data.train == given.adapters[name].data.train
        # As the build of the bundle.
        assert spec.data.held_out == manifest.recipe["adapters"][name]["data"]["held_out"] != 0.5
    assert recipe.base == base


def test_a_recipe_trains_what_the_bundle_has(home: Path, tiny_gguf: Callable[[str], Path]) -> None:
    manifest = read_manifest(home)
    manifest.recipe["route"] = {}
    manifest.recipe["adapters"]["light"].update(confidence=True, min_confidence=0.8, unsure="tone")
    without_tone = replace(manifest, adapters={"light": manifest.adapters["light"]})
    recipe = recipe_for(home, without_tone, RecipeSource(str(tiny_gguf("qwen2"))))
    assert list(recipe.adapters) == ["light"] and recipe.route is None
    # As in the bundle, where no adapter answers in place of an unsure answer.
    assert recipe.adapters["light"].unsure == "mark"
    assert recipe_for(home, manifest, RecipeSource(str(tiny_gguf("qwen2")))).adapters["light"].unsure == "tone"


Bases = Callable[[str], Path]


def unsupported(home: Path, _bases: Bases) -> list[object]:
    folder = home.with_name("gpt2")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return ["--base", folder]


def no_bundle(home: Path, _bases: Bases) -> list[object]:
    shutil.rmtree(home)
    return ["--base", "smollm2-135m"]


def without_recipe(home: Path, _bases: Bases) -> list[object]:
    path = home / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": {}}))
    return ["--base", "smollm2-135m"]


def without_rows(home: Path, _bases: Bases) -> list[object]:
    for name in ("light.jsonl", "tone.csv"):
        home.with_name(name).unlink()
    return ["--base", "smollm2-135m"]


def another_recipe(home: Path, bases: Bases) -> list[object]:
    make_recipe(home.with_name("other"), bases("llama"), {"light": adapter_of()})
    return ["--base", "smollm2-135m", "--recipe", home.with_name("other") / "recipe.yaml"]


def texts(home: Path, _bases: Bases) -> list[object]:
    write_rows(home.with_name("texts.jsonl"), [{"text": "turn on"}])
    return ["--base", "smollm2-135m", "--data", "light=texts.jsonl"]


def on(arch: str, *settings: str) -> Callable[[Path, Bases], list[object]]:
    """The options for a tiny base with these settings."""
    return lambda _, bases: ["--base", bases(arch), *(word for text in settings for word in ("--set", text))]


def on_page(page: str, *options: str) -> Callable[[Path, Bases], list[object]]:
    """The options for a page in the folder of the bundle."""
    return lambda _, bases: ["--base", bases("qwen2"), "--page", page, *options]


def given(*options: str) -> Callable[[Path, Bases], list[object]]:
    return lambda *_: [*options]


REFUSED: dict[str, tuple[int, str, Callable[[Path, Bases], list[object]]]] = {
    "nothing to change": (2, "no base and no quantization; give one of them", given()),
    "no bundle": (3, "is not a bundle", no_bundle),
    "unknown base": (3, "no base 'smollm2-135'; did you mean 'smollm2-135m'", given("--base", "smollm2-135")),
    "unknown quantization": (
        2, "quantization: no quantization 'q4_1x'; did you mean", given("--quantization", "q4_1x"),
    ),
    "unknown architecture": (5, "architecture 'gpt2' of base", unsupported),
    "the same base": (2, "is the base that", on("llama")),
    "no recipe": (3, "has no recipe, because its adapters were trained elsewhere; write one", without_recipe),
    "rows that are gone": (3, "files that are not here: light.jsonl (light); tone.csv (tone)", without_rows),
    "recipe without an adapter": (3, "does not have its adapter 'tone'; give the recipe", another_recipe),
    "modules that it lacks": (
        2, "adapter 'tone': the base has no module 'q_proj'; did you mean 'qkv_proj'? Or set",
        on("phi3", "adapters.tone.method={name: lora, target_modules: [q_proj]}"),
    ),
    "format that cannot hold it": (
        5, "onnx does not support bases of architecture 'olmo2'", on("olmo2", "targets=[gguf, onnx]"),
    ),
    "unknown adapter": (3, "no adapter 'lihgt'", given("--base", "smollm2-135m", "--data", "lihgt=test.jsonl")),
    "rows of another kind": (2, "texts.jsonl:1: is plain text, but metric exact compares answers", texts),
    "page over training rows": (2, "tone.csv is not an .html file", on_page("tone.csv")),
    "page in the bundle": (2, "page.html is inside the bundle", on_page("home/page.html")),
    "page in the new bundle": (
        2, "page.html is inside the bundle new", on_page("new/page.html", "--out", "new"),
    ),
    "page in the new bundle by default": (
        2, "page.html is inside the bundle ", on_page("home-rebased/a/page.html"),
    ),
    "context too long": (2, "supports at most 512 tokens; set it", on("qwen2", "context_length=1024")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rebased_is_refused_in_one_line_before_training(
    case: str, home: Path, tiny_gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, message, options = REFUSED[case]
    assert run(home, *options(home, tiny_gguf)) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and "; " in line
    assert not list(home.parent.glob("home-rebased.rebase/home-rebased.work/train/*"))
    assert not home.with_name("home-rebased").exists()


@pytest.mark.parametrize(
    ("folder", "options", "told"),
    [("home", ["."], "is the base that"), ("new", ["../home", "--out", "."], "is the folder that you are in")],
)
def test_the_current_folder_is_rebased_but_not_replaced(
    folder: str,
    options: list[str],
    told: str,
    home: Path,
    tiny_gguf: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (home.parent / "new").mkdir()
    monkeypatch.chdir(home.parent / folder)
    base = ["--base", str(tiny_gguf("llama")), "--folder", str(home.parent)]
    assert main(["rebase", *options, *base, "--quiet"]) == 2
    assert told in capsys.readouterr().err


def test_validation_rows_are_doubted_where_the_rows_are_not_those_of_the_build(
    home: Path, tiny_gguf: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for rows in (DATA["light.jsonl"], lights(30)):
        write_rows(home.with_name("light.jsonl"), rows)
        assert main(["rebase", str(home), "--base", str(tiny_gguf("llama"))]) == 2
        error = capsys.readouterr().err
        assert ("warning: light: the rows or data options changed" in error) is (rows is not DATA["light.jsonl"])
        assert "warning: tone" not in error


def test_a_bundle_that_is_damaged_is_found_before_training(home: Path, tiny_gguf: Callable[[str], Path]) -> None:
    (file,) = (home / "adapters/light").glob("*.gguf")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EdgetuneError, match="light"):
        edgetune.rebase(home, tiny_gguf("qwen2"))
    assert not list(home.parent.glob("home-rebased.rebase/home-rebased.work/train/*"))
