from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import divergence
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import CancelledError, UsageError
from recipes import PLAIN, adapter_of, lights, make_recipe, values_of, write_recipe
from trainings import QUIET, Listening, Stopping

from edgetune.bases import load_torch, resolve
from edgetune.building.decoder.quantization import choose_quantization
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.cli.main import main
from edgetune.planning.quantization import MAX_KL, MeasuredCandidate, best_of
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_task


def recipe_of(folder: Path, base: Path, quantization: object = "auto", **keys: Any) -> Recipe:  # noqa: ANN401 - values
    adapters = {"command": adapter_of(**PLAIN)}
    return make_recipe(folder, base, adapters, data={"rows.jsonl": lights(20)}, quantization=quantization, **keys)


def names_of(recipe: Recipe) -> list[str | None]:
    return [item.quantization for item in plan_build(recipe).plan.base.candidates]


def budget_for(base: Path, quantization: str, folder: Path) -> float:
    """The MB of a tiny base in this quantization."""
    quantize_gguf(base, folder / "sized.gguf", quantization)
    return (folder / "sized.gguf").stat().st_size / 1e6


def test_a_build_ships_the_nearest_quantization_within_the_budget_and_takes_more_adapters(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_gguf("llama")
    budget_mb = budget_for(base, "q5_0", tmp_path) + 1e-3
    recipe, listening = recipe_of(tmp_path, base, {"budget_mb": budget_mb}), Listening()
    build(recipe, tmp_path / "home", progress=listening)
    manifest = read_manifest(tmp_path / "home")
    stored = json.loads((tmp_path / "home.work" / "base" / "quantizations.json").read_text())["measured"]
    nearest = min(stored, key=lambda item: item["kl"])
    assert manifest.base.quantization == manifest.recipe["quantization"] == nearest["quantization"]
    assert manifest.files[manifest.base.files["gguf"]].bytes == nearest["bytes"] <= budget_mb * 1e6
    assert {"q5_0", "q4_0"} <= {item["quantization"] for item in stored}
    assert "q8_0" not in {item["quantization"] for item in stored}
    frontier = [line for line in listening.lines if line.startswith("quantization ")]
    assert len(frontier) == len(stored) and " MB, KL " in frontier[0]
    assert any(line.startswith(f"chose quantization {nearest['quantization']} 0.") for line in listening.lines)
    # Stops at the first quantization that is measured again.
    build(recipe, tmp_path / "home", progress=Stopping(1, AssertionError), resume=True)
    assert read_manifest(tmp_path / "home").base.fingerprint == manifest.base.fingerprint
    adapters = {"more": adapter_of(**PLAIN)}
    more = make_recipe(tmp_path / "more", base, adapters, quantization={"budget_mb": budget_mb})
    build(more, tmp_path / "home", progress=QUIET, into=True)
    after = read_manifest(tmp_path / "home")
    assert (after.base.fingerprint, list(after.adapters)) == (manifest.base.fingerprint, ["command", "more"])


def test_the_kl_is_that_of_the_dequantized_weights(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    recipe = recipe_of(tmp_path, base, {"optimize": "size"})
    planned = plan_build(recipe)
    choose_quantization(planned.plan, planned.tasks, tmp_path / "work", QUIET, None)
    stored = json.loads((tmp_path / "work" / "quantizations.json").read_text())["measured"]
    task = read_task("command", recipe)
    with torch.inference_mode():
        tokenizer = GgufTokenizer(base)
        rows = [torch.tensor([row.tokens]) for row in task.tokenize(tokenizer, recipe.context_length)[1]]
        tokenizer.close()
        logits = {}
        for name in (None, "q4_0"):
            made = resolve(str(base), folder=Path(), quantization=name, work=tmp_path, progress=QUIET, converter=None)
            model = load_torch(made, torch.float32)
            logits[name] = np.concatenate([model(input_ids=row).logits[0].numpy() for row in rows])
    expected = divergence(logits[None], logits["q4_0"]).mean()
    found = next(item["kl"] for item in stored if item["quantization"] == "q4_0")
    assert found == pytest.approx(expected, rel=0.1)


def test_an_interrupted_measurement_goes_on_with_what_is_left(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"})
    planned, work = plan_build(recipe), tmp_path / "work"
    with pytest.raises(CancelledError):
        choose_quantization(planned.plan, planned.tasks, work, Stopping(3, CancelledError("stopped", "resume")), None)
    before = json.loads((work / "quantizations.json").read_text())["measured"]
    choose_quantization(planned.plan, planned.tasks, work, QUIET, None)
    after = json.loads((work / "quantizations.json").read_text())["measured"]
    assert 0 < len(before) < len(after) == len(planned.plan.base.candidates)
    assert after[: len(before)] == before
    assert [path.name for path in work.iterdir()] == ["quantizations.json"]


def test_rows_that_move_from_training_to_validation_are_measured_anew(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    rows, keys = lights(20), []
    for count in (16, 12):
        adapter = {"data": {"train": rows[:count], "validation": rows[count:]}}
        values = values_of(tiny_gguf("llama"), {"command": adapter}, quantization={"optimize": "size"})
        planned = plan_build(Recipe.from_dict(values))
        with pytest.raises(CancelledError):
            stopping = Stopping(2, CancelledError("stopped", "resume"))
            choose_quantization(planned.plan, planned.tasks, tmp_path / "work", stopping, None)
        keys.append(json.loads((tmp_path / "work" / "quantizations.json").read_text())["key"])
    assert keys[0] != keys[1]


def test_sizes_follow_the_targets_and_nothing_is_measured_again(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    base, work = tiny_gguf("llama"), tmp_path / "work"
    planned = plan_build(recipe_of(tmp_path, base, {"optimize": "size"}, targets=["onnx"]))
    choose_quantization(planned.plan, planned.tasks, work, QUIET, None)
    # The tables of angles make ONNX the larger format.
    budget_mb = budget_for(base, "q4_0+q4_0", tmp_path) + 1e-4
    planned = plan_build(recipe_of(tmp_path, base, {"budget_mb": budget_mb}, targets=["onnx", "gguf"]))
    chosen = choose_quantization(planned.plan, planned.tasks, work, Stopping(1, AssertionError), None)
    assert chosen == "q4_0+q4_0"


def test_a_base_is_measured_with_the_matrix_of_the_rows(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"}, imatrix="auto")
    plain = recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"})
    kls = []
    for number, each in enumerate((recipe, plain)):
        planned, work = plan_build(each), tmp_path / str(number)
        choose_quantization(planned.plan, planned.tasks, work, QUIET, None)
        stored = json.loads((work / "quantizations.json").read_text())["measured"]
        kls.append({item["quantization"]: item["kl"] for item in stored})
    assert kls[0]["q8_0"] == kls[1]["q8_0"]
    assert kls[0]["q4_0"] != kls[1]["q4_0"]


def test_the_speed_is_measured_if_it_is_asked_for(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    planned = plan_build(recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "speed"}))
    listening = Listening()
    chosen = choose_quantization(planned.plan, planned.tasks, tmp_path / "work", listening, None)
    stored = json.loads((tmp_path / "work" / "quantizations.json").read_text())["measured"]
    fastest = max((item for item in stored if item["kl"] <= MAX_KL), key=lambda item: item["tokens_per_s"])
    assert chosen == fastest["quantization"]
    assert " tokens/s" in listening.lines[-2]


@pytest.mark.usefixtures("forked_converter")
def test_rows_as_long_as_the_base_allows_leave_out_tokens_that_are_timed(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 60}))
    planned = plan_build(recipe_of(tmp_path, base, {"optimize": "speed"}, context_length=60))
    assert choose_quantization(planned.plan, planned.tasks, tmp_path / "work", QUIET, None)


def test_the_plan_shows_the_sizes_and_measures_nothing(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), quantization={"optimize": "size"})
    assert main(["plan", str(recipe), "--out", str(tmp_path / "home")]) == 0
    printed = capsys.readouterr().out
    assert "measure quantizations, use the best one" in printed
    assert "to measure    q8_0 0." in printed and "q4_0+q4_0 0." in printed
    assert not (tmp_path / "home.work").exists()
    assert main(["plan", str(recipe), "--json"]) == 0
    candidates = json.loads(capsys.readouterr().out)["base"]["candidates"]
    sizes = [item["bytes"] for item in candidates]
    assert sizes == sorted(sizes, reverse=True)
    for item in candidates[::4]:
        assert item["bytes"] / 1e6 == pytest.approx(
            budget_for(tiny_gguf("llama"), item["quantization"], tmp_path), rel=0.02
        )


def test_what_a_bundle_would_requantize_or_has_twice_is_not_measured(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    # 64 values per row: llama.cpp stores all of q6_k as q8_0.
    found = names_of(recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"}))
    assert "q8_0" in found and "q6_k" not in found and "iq4_nl+q5_0" in found
    both = names_of(recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"}, targets=["gguf", "onnx"]))
    assert {name.partition("+")[0] for name in both if name} <= {"q8_0", "q5_0", "q4_0", "q4_k_m"}
    score = names_of(recipe_of(tmp_path, tiny_gguf("llama")))
    assert score[0] == "q8_0" and len(score) < len(found)


def test_a_quantized_file_within_the_budget_ships_unchanged(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tmp_path / "small.gguf"
    quantize_gguf(tiny_gguf("llama"), base, "q4_1")
    assert names_of(recipe_of(tmp_path, base)) == [None]
    build(recipe_of(tmp_path, base, imatrix="auto"), tmp_path / "home", progress=QUIET)
    manifest = read_manifest(tmp_path / "home")
    assert (manifest.base.quantization, manifest.recipe["quantization"], manifest.recipe["imatrix"]) == (None,) * 3
    budget_mb = base.stat().st_size / 1e6 - 1e-3
    assert None not in names_of(recipe_of(tmp_path, base, {"budget_mb": budget_mb}))


def test_a_budget_that_nothing_meets_names_the_nearest_and_one_that_is_enough(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {"budget_mb": 0.01})
    with pytest.raises(
        UsageError, match=r"budget_mb is 0.01, but the smallest of base .* is (q4_0|iq4_nl)\+.* MB"
    ) as caught:
        plan_build(recipe)
    enough = re.search(r"raise it to ([0-9.]+), or", str(caught.value))
    assert enough and names_of(recipe_of(tmp_path, tiny_gguf("llama"), {"budget_mb": float(enough[1])}))


def test_a_plan_refuses_int8_if_a_candidate_would_be_trained_on_its_grid(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    base, adapters = tiny_gguf("llama"), {"whole": adapter_of(merged=True, training={"precision": "int8"})}
    # q8_0, the largest, needs no grid.
    recipe = make_recipe(tmp_path, base, adapters, quantization={"optimize": "size"})
    with pytest.raises(UsageError, match=r"whole is trained with weights rounded to .*q[456].*, and not in int8"):
        plan_build(recipe)


def test_only_what_the_board_can_run_is_measured(
    tiny_gguf: Callable[[str], Path], slow_board: Callable[..., str], tmp_path: Path
) -> None:
    everywhere = names_of(recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"}))
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), {"optimize": "size"}, device=slow_board(), threads=None)
    on_board = names_of(recipe)
    assert 0 < len(on_board) < len(everywhere)
    planned = plan_build(recipe)
    choose_quantization(planned.plan, planned.tasks, tmp_path / "work", QUIET, None)
    kept = json.loads((tmp_path / "work/quantizations.json").read_text(encoding="utf-8"))
    assert [item["quantization"] for item in kept["measured"]] == on_board


MEASURED = (
    MeasuredCandidate("q8_0", 140, 0.01, 10),
    MeasuredCandidate("q5_0", 95, 0.1, 16),
    MeasuredCandidate("iq4_nl", 92, 0.14, 14),
    MeasuredCandidate("q4_0", 92, 0.3, 20),
)


@pytest.mark.parametrize(
    ("optimize", "budget", "chosen"),
    [
        ("score", None, "q8_0"),
        ("score", 95, "q5_0"),
        ("size", None, "iq4_nl"),
        ("speed", None, "q5_0"),
        ("speed", 93, "iq4_nl"),
    ],
)
def test_the_choice_is_the_one_that_is_asked_for(
    optimize: str, budget: float | None, chosen: str, tmp_path: Path
) -> None:
    spec = {"optimize": optimize, "budget_mb": budget and budget / 1e6}
    assert best_of(MEASURED, recipe_of(tmp_path, Path("base.gguf"), spec)).quantization == chosen


def test_a_size_that_costs_too_much_names_the_nearest_and_what_to_change(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, Path("base.gguf"), {"optimize": "size", "budget_mb": 93e-6})
    far = [replace(item, kl=item.kl + 0.1) for item in MEASURED]
    with pytest.raises(UsageError) as caught:
        best_of(far, recipe)
    assert "nearest is iq4_nl 0.0 MB, KL 0.240, 14.0 tokens/s" in caught.value.message
    assert caught.value.remedy == "set imatrix: auto, raise budget_mb, or set optimize: score"
