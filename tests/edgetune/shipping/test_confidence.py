"""The curves that a build fits through the runtime."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime import Runtime, UsageError
from edgetune_runtime.bundle import ConfidenceCurve, Manifest, UnsureRule, read_manifest
from edgetune_runtime.inference.measuring import logits_after
from edgetune_runtime.inference.similarity import read_prompts
from recipes import adapter_of, lights, make_recipe, write_rows
from runtime.bundles import change_manifest
from trainings import Listening

from edgetune.building.pipeline import build
from edgetune.common.progress import Progress
from edgetune.common.spread import spread
from edgetune.recipe.model import Recipe
from edgetune.shipping.confidence import _chosen, _never_sure
from edgetune.tasks.confidence import MIN_ROWS, RatedAnswer, fit_curves
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import score
from edgetune.tasks.negatives import given
from edgetune.tasks.task import read_task

COLORS = ("red", "warm", "blue")
METHOD = {"name": "lora", "r": 2, "lora_alpha": 32}
CHOICES = {"output": {"choices": list(COLORS)}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "command": lights(60, COLORS),
    "color": [{"text": f"turn on the light {n}", "label": COLORS[n % 3]} for n in range(60)],
    "few": lights(60, COLORS),
    "graded": lights(60, ("turn on the light in the hall",)),
    "off": lights(60, COLORS),
    "odd": lights(60, COLORS),
}
MORE: dict[str, dict[str, Any]] = {
    "command": {**CHOICES, "held_out": 0.4, "min_confidence": 0.7, "unsure": "color"},
    # Trained until it writes something.
    "color": {
        "metric": "label",
        "held_out": 0.4,
        "min_confidence": 0.99,
        "training": {"max_steps": 40, "learning_rate": 1e-2},
    },
    "few": {**CHOICES, "held_out": 0.1},
    "graded": {"metric": "rouge_l", "held_out": 0.4},
    "off": {**CHOICES, "held_out": 0.4, "confidence": False},
    "odd": {**CHOICES, "held_out": 0.4, "metric": "json"},
}


@pytest.fixture(scope="module")
def built(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bundle in both formats, and what its build said."""
    folder, listening = tmp_path_factory.mktemp("confidence"), Listening()
    plain: dict[str, Any] = {"method": METHOD, "draft": False, "golden": False}
    adapters = {name: adapter_of(train=f"{name}.jsonl", **plain, **MORE[name]) for name in ROWS}
    data = {f"{name}.jsonl": rows for name, rows in ROWS.items()}
    keys: dict[str, Any] = {"targets": ["gguf", "onnx"], "training": {"evals": 1}}
    recipe = make_recipe(folder, tiny_gguf("llama"), adapters, data=data, **keys)
    build(recipe, folder / "home", progress=listening)
    return folder / "home", listening.lines


@pytest.fixture
def manifest(built: tuple[Path, list[str]]) -> Manifest:
    return read_manifest(built[0])


def test_each_format_has_curves_of_its_own(manifest: Manifest) -> None:
    for name, expected in (("command", ["choice"]), ("color", ["label"])):
        curves = manifest.adapter(name).confidence
        assert list(curves) == ["gguf", "onnx"]
        for kinds in curves.values():
            assert list(kinds) == expected
            for curve in kinds.values():
                assert curve.rows == 24
                assert curve.slope is not None
                assert sum(rows for _, _, rows in curve.bins) == 24


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_a_prompt_to_classify_is_compared_with_the_training_prompts(
    engine: str, built: tuple[Path, list[str]], manifest: Manifest, tmp_path: Path
) -> None:
    files = {name: entry.similarity for name, entry in manifest.adapters.items() if entry.similarity is not None}
    assert files == {"color": "adapters/color/similarity.bin"}
    without = Path(shutil.copytree(built[0], tmp_path / "without"))
    change_manifest(without, lambda raw: raw["adapters"]["color"].update(similarity=None))
    text, options = "switch everything off now", {"engine": engine, "disk_mb": 0}
    with Runtime.open(built[0], **options) as runtime, Runtime.open(without, **options) as other:
        found, own = (each.classify(text, adapter="color") for each in (runtime, other))
        # No confidence needs it among other labels.
        among, own_among = (each.classify(text, COLORS[:2], adapter="color") for each in (runtime, other))
        similarities = read_prompts(built[0] / files["color"]).similarities(logits_after(runtime, text, "color"))
    assert found.label == own.label
    assert found.log_odds == pytest.approx(similarities.label_log_odds(found.label, own.log_odds), rel=1e-3)
    assert found.log_odds != pytest.approx(own.log_odds, rel=1e-3)
    assert among == own_among


@pytest.mark.parametrize("engine", ["gguf", "onnx"])
def test_answers_of_a_build_have_a_confidence(engine: str, built: tuple[Path, list[str]]) -> None:
    with Runtime.open(built[0], engine=engine, disk_mb=0) as runtime:
        answer = runtime.generate("turn on the light 7", adapter="command", unsure="mark")
        assert answer.confidence is not None
        assert 0 < answer.confidence < 1
        assert answer.is_unsure == (answer.confidence < 0.7)
        assert runtime.classify("turn on the light 7", adapter="color").confidence is not None
        assert runtime.generate("turn on the light 7", adapter="color").confidence is not None
        for name in ("few", "graded", "off", "odd"):
            assert runtime.generate("turn on the light 7", adapter=name, max_tokens=8).confidence is None


@pytest.mark.parametrize("name", ["command", "color"])
def test_the_share_of_right_answers_is_that_of_evaluate(name: str, built: tuple[Path, list[str]]) -> None:
    bundle, _ = built
    rows = read_task(name, Recipe.from_file(bundle.parent / "recipe.yaml")).confidence_rows
    for engine, curves in read_manifest(bundle).adapter(name).confidence.items():
        with Runtime.open(bundle, engine=engine, disk_mb=0) as runtime:
            result = score(runtime, name, rows, Progress(quiet=True))
        kind, curve = next(iter(curves.items()))
        assert curve.right == pytest.approx(result.score, abs=1e-4)
        # Fitted on the log odds that answers have.
        rated = [RatedAnswer(kind, row.log_odds or 0.0, row.score >= 1) for row in result.details]
        assert fit_curves(rated)[kind].slope == pytest.approx(curve.slope, rel=1e-3)
        assert all(row.kind in curves and row.confidence is not None for row in result.details)


def test_the_build_says_which_answers_can_never_be_sure(built: tuple[Path, list[str]]) -> None:
    said = "\n".join(built[1])
    # After 24 right answers a confidence is at most 25/26.
    for engine in ("gguf", "onnx"):
        assert f"{engine} color: all label answers are below min_confidence 0.99; lower it, or" in said
    assert "command: all" not in said


def test_kinds_without_a_confidence_are_never_sure() -> None:
    curves = {"value": ConfidenceCurve(30, 1.0, 1.0, 0.0), "nothing": ConfidenceCurve(9, 1.0)}
    (said,) = _never_sure(curves, 0.5)
    assert said.startswith("all nothing answers are unsure, as they have no confidence; give more such rows")


def test_the_build_says_what_has_no_confidence(built: tuple[Path, list[str]]) -> None:
    said = "\n".join(built[1])
    assert f"few: no confidence, as 6 rows are too few ({MIN_ROWS} are needed)" in said
    assert " if exact)" in said.split("of 24 choice answers right, calibration error 0.")[1]
    assert "odd: 24 of 24 validation rows, such as " in said and "cannot be scored by json" in said
    assert "graded: no confidence" not in said
    assert "off: no confidence" not in said


def test_the_rule_for_unsure_answers_is_in_the_manifest(manifest: Manifest) -> None:
    assert manifest.adapter("command").unsure == UnsureRule(0.7, "color")
    assert manifest.adapter("few").unsure is None


@pytest.mark.parametrize(
    ("own", "made", "most", "chosen"),
    [
        (400, 30, 200, (170, 30)),
        (400, 200, 200, (134, 66)),
        (80, 150, 200, (80, 120)),
        (90, 40, 200, (90, 40)),
        # Of an adapter whose folds have nearly all rows.
        (3, 2, 1, (1, 0)),
    ],
)
def test_few_texts_out_of_scope_all_remain_among_many_rows(
    own: int, made: int, most: int, chosen: tuple[int, int]
) -> None:
    rows = [TaskRow(f"{name}:{n}", text="hi") for name, count in (("rows", own), ("made", made)) for n in range(count)]
    kept = _chosen(rows, most)
    assert (len(given(kept)), len(kept) - len(given(kept))) == chosen


def task_of(folder: Path, rows: int = 300, **adapter: Any) -> Any:  # noqa: ANN401 - a Task
    """A task whose rows are those of `rows.jsonl`, with other data keys under `data`."""
    data = {"train": "rows.jsonl", "held_out": 0.5, **adapter.pop("data", {})}
    recipe = make_recipe(folder, "base", {"task": {"data": data, **adapter}}, data={"rows.jsonl": lights(rows)})
    return read_task("task", recipe)


def test_many_validation_rows_are_divided(tmp_path: Path) -> None:
    task = task_of(tmp_path, 400)
    assert (len(task.train), len(task.validation)) == (200, 200)
    assert (len(task.choosing), len(task.confidence_rows)) == (100, 100)
    assert not {row.where for row in task.choosing} & {row.where for row in task.confidence_rows}
    for name, training in (("auto", "auto"), ("last", {"checkpoint": "last", "patience": None})):
        to_the_end = task_of(tmp_path / name, 400, training=training)
        assert to_the_end.choosing == to_the_end.confidence_rows == to_the_end.validation
    for name, training in (("best", {"auto": True, "checkpoint": "best"}), ("early", {"auto": True, "patience": 3})):
        assert len(task_of(tmp_path / name, 400, training=training).confidence_rows) == 100
    few = task_of(tmp_path / "few", 398)
    assert few.choosing == few.confidence_rows == few.validation
    off = task_of(tmp_path / "off", 400, confidence=False)
    assert (off.choosing, off.confidence_rows) == (off.validation, [])


def test_rows_of_their_own_leave_all_validation_rows_to_the_checkpoint(tmp_path: Path) -> None:
    rows = [{"prompt": f"close the blind {n}", "completion": "reply on"} for n in range(30)]
    write_rows(tmp_path / "own.jsonl", rows)
    task = task_of(tmp_path, 400, data={"confidence": "own.jsonl"})
    assert task.choosing == task.validation
    assert len(task.confidence_rows) == 30


def test_both_halves_have_all_labels_though_rows_alternate(tmp_path: Path) -> None:
    rows = [{"text": f"lamp {n}", "label": ("on", "off")[n % 2]} for n in range(600)]
    data = {"train": "rows.jsonl", "validation": "more.jsonl"}
    files = {"rows.jsonl": rows[:20], "more.jsonl": rows[20:]}
    task = read_task("task", make_recipe(tmp_path, "base", {"task": {"data": data}}, data=files))
    for half in (task.choosing, task.confidence_rows, spread(task.validation, 58)):
        counts = Counter(row.completion for row in half)
        assert abs(counts["on"] - counts["off"]) < 0.5 * len(half)


def test_validation_rows_that_are_trained_on_say_nothing_of_the_confidence(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "more.jsonl", [*lights(30), *({"prompt": f"hello {n}", "completion": "on"} for n in range(9))]
    )
    task = task_of(tmp_path, 30, data={"validation": "more.jsonl"})
    assert (len(task.choosing), len(task.confidence_rows)) == (39, 9)
    (doubt,) = task.doubts
    assert doubt.startswith("30 of 39 validation rows have the prompt of a training row, such as ")


def test_training_rows_are_refused(tmp_path: Path) -> None:
    loud = [{**row, "prompt": f"{row['prompt'].upper()}!"} for row in lights(400)]
    write_rows(tmp_path / "own.jsonl", [{"prompt": "hello", "completion": "on"}, *loud])
    with pytest.raises(UsageError, match="'task': 200 of 401 confidence rows have the prompt of a training row"):
        task_of(tmp_path, 400, data={"confidence": "own.jsonl"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"min_confidence": 0.8, "data": {"held_out": 0.1}},
            "has min_confidence, but 10 validation rows give none",
        ),
        (
            {"min_confidence": 0.8, "out_of_scope": True, "metric": "label", "data": {"held_out": 0.06}},
            "has min_confidence, but 6 validation rows give none; give 20 or more, which are not training rows",
        ),
        ({"min_confidence": 0.8, "metric": "rouge_l"}, "rouge_l scores no answer as right or wrong"),
        ({"unsure": "base"}, "unsure and ask need min_confidence"),
        ({"min_confidence": 0.8, "confidence": False}, "min_confidence needs confidence: true"),
        ({"min_confidence": 0.8, "unsure": "ask"}, "there is no question; write it as ask"),
        ({"min_confidence": 0.8, "unsure": "base", "ask": "which?"}, "unsure is base, and ask is given too"),
        ({"min_confidence": 1.0}, "less than 1"),
    ],
)
def test_what_gives_no_confidence_is_refused_before_the_build(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        task_of(tmp_path, 100, **keys)
