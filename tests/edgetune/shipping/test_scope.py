"""What is out of scope for an adapter, chosen at the end of a build and found by the runtime."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from edgetune_runtime.bundle import Manifest, read_manifest
from edgetune_runtime.cli.main import main
from edgetune_runtime.inference.confidence import NOTHING, VALUE
from edgetune_runtime.inference.measuring import logits_after
from edgetune_runtime.inference.similarity import read_prompts
from recipes import adapter_of, make_recipe
from runtime.bundles import change_manifest
from trainings import QUIET

from edgetune.building.pipeline import build
from edgetune.recipe.model import Recipe
from edgetune.recipe.parts import OutOfScopeSpec
from edgetune.shipping.scope import ScopeAnswer, scope_of
from edgetune.tasks.evaluation import evaluate
from edgetune.tasks.task import read_task

COLORS = ("red", "warm")
ROWS = [{"text": f"make the lamp number {n} {COLORS[n % 2]}", "label": COLORS[n % 2]} for n in range(100)]
ASKED = ROWS[0]["text"]


@pytest.fixture(scope="module")
def bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in both formats with an adapter that has a scope."""
    folder = tmp_path_factory.mktemp("scope")
    scope = {"label": "other", "refused": 0.25}
    adapters = {"color": adapter_of(train="color.jsonl", held_out=0.4, draft=False, out_of_scope=scope)}
    keys = {"targets": ["gguf", "onnx"], "training": {"evals": 1}}
    recipe = make_recipe(folder, tiny_gguf("llama"), adapters, data={"color.jsonl": ROWS}, **keys)
    return build(recipe, folder / "home", progress=QUIET).bundle


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_no_more_validation_rows_are_refused_than_the_recipe_says(engine: str, manifest: Manifest) -> None:
    scope = manifest.adapters["color"].scope[engine]
    assert scope.label == "other"
    assert 0 <= scope.refused <= 0.25 or scope.threshold < -1e5
    assert 0 <= scope.found <= 1


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_the_runtime_refuses_the_share_of_validation_rows_that_the_manifest_states(
    engine: str, bundle: Path, manifest: Manifest
) -> None:
    task = read_task("color", Recipe.from_file(bundle.parent / "recipe.yaml"))
    rows = [row for row in task.validation if row.completion != "other"]
    with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
        refused = [runtime.classify(row.messages or (), adapter="color").is_out_of_scope for row in rows]
    assert sum(refused) / len(rows) == manifest.adapters["color"].scope[engine].refused


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_the_confidence_is_that_of_answers_with_the_scope(engine: str, bundle: Path, manifest: Manifest) -> None:
    rows = read_task("color", Recipe.from_file(bundle.parent / "recipe.yaml")).confidence_rows
    with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
        kinds = Counter(runtime.classify(row.messages or (), adapter="color").kind for row in rows)
    assert kinds[NOTHING] > 0
    curves = manifest.adapters["color"].confidence[engine]
    # Another one is for labels that a chat writes.
    assert {kind: curve.rows for kind, curve in curves.items() if kind != VALUE} == kinds


@pytest.mark.parametrize("refused", [0.05, 0.25])
def test_the_threshold_refuses_the_stated_share_of_known_rows_and_no_more(refused: float) -> None:
    known = [ScopeAnswer(True, float(odds)) for odds in range(100)]
    others = [ScopeAnswer(False, odds - 0.5) for odds in (1, 3, 60)]
    # With the label of texts that are out of scope.
    named = ScopeAnswer(False, -1e6)
    scope = scope_of(OutOfScopeSpec(refused=refused), [*known, *others, named])
    assert scope.refused == refused
    # Midway between two rows.
    assert scope.threshold == 100 * refused - 0.5
    assert scope.found == 3 / 4
    # The label alone refuses more than the recipe allows: no threshold refuses others besides.
    mislabelled = [ScopeAnswer(True, -1e6)] * 60
    wide = scope_of(OutOfScopeSpec(refused=refused), [*known, *mislabelled, *others, named])
    assert (wide.refused, wide.found, wide.threshold) == (0.375, 1 / 4, -1e6)
    half = scope_of(OutOfScopeSpec(refused=0.5), [*known, *[ScopeAnswer(True, -1e6)] * 100])
    assert (half.refused, half.threshold) == (0.5, -0.01)
    # So few rows that none may be refused, nor by rounding.
    few = scope_of(OutOfScopeSpec(refused=0.1), known[:9])
    assert (few.refused, few.threshold) == (0, -0.01)


def test_the_runtime_compares_a_prompt_with_the_training_prompts(bundle: Path, manifest: Manifest) -> None:
    file = manifest.adapters["color"].similarity
    assert file == "adapters/color/similarity.bin" and file in manifest.files
    prompts = read_prompts(bundle / file)
    assert sorted(set(prompts.labels)) == sorted(COLORS) and len(prompts.labels) == 60
    with Runtime.open(bundle, disk_mb=0) as runtime:
        trained, other = (
            max(prompts.similarities(logits_after(runtime, text, "color")).nearest.values())
            for text in (ASKED, "\u00e9\u00e9 \u4f60\u597d 0")
        )
    assert 0.99 < trained < 1.01
    assert other < trained


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_a_label_with_a_lower_score_than_the_threshold_is_out_of_scope(
    engine: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for threshold in (-1e6, 1e6):
        home = Path(shutil.copytree(bundle, tmp_path / f"{threshold}"))
        change_manifest(home, lambda raw, to=threshold: raw["adapters"]["color"]["scope"][engine].update(threshold=to))
        with Runtime.open(home, engine=engine, disk_mb=0) as runtime:
            found = runtime.classify(ASKED, adapter="color")
            best = max(found.probabilities, key=found.probabilities.__getitem__)
            is_out = best == "other" or threshold > 0
            assert (found.label, found.is_out_of_scope) == ("other" if is_out else best, is_out)
            among = runtime.classify(ASKED, COLORS, adapter="color")
            assert among.label in COLORS and not among.is_out_of_scope
        command = ["classify", str(home), "--adapter", "color", "--prompt", ASKED, "--engine", engine]
        assert main([*command, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["label"], printed["out_of_scope"]) == (found.label, is_out)
        assert main(command) == 0
        assert capsys.readouterr().out.split("\t")[0] == found.label


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_neither_another_scale_nor_several_adapters_have_a_scope(engine: str, bundle: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(bundle, tmp_path / "home"))
    change_manifest(home, lambda raw: raw["adapters"]["color"]["scope"][engine].update(threshold=1e6))
    with Runtime.open(home, engine=engine, disk_mb=0) as runtime:
        assert runtime.classify(ASKED, adapter={"color": 1.0}).is_out_of_scope
        assert not runtime.classify(ASKED, adapter={"color": 0.5}).is_out_of_scope
        found = runtime.classify(ASKED, adapter="color")
        assert found.label in found.probabilities


def test_golden_answers_do_not_depend_on_the_scope(bundle: Path) -> None:
    for engine in ("gguf", "onnx"):
        assert main(["check", str(bundle), "--engine", engine]) == 0


def test_rows_out_of_scope_are_scored_like_others(bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [*ROWS[:4], {"text": "who wrote Hamlet", "label": "other"}]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = evaluate(bundle, "color", data, progress=QUIET)
    assert (result.metric, result.rows) == ("label", 5)
    with Runtime.open(bundle, disk_mb=0) as runtime:
        right = [runtime.classify(row["text"], adapter="color").label == row["label"] for row in rows]
    assert result.score == pytest.approx(sum(right) / 5)
