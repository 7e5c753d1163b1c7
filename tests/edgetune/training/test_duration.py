from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, make_recipe, write_rows
from trainings import Listening, job

from edgetune.bases import Base, load_torch
from edgetune.building import trial
from edgetune.building.plan import plan_build
from edgetune.recipe.model import Recipe
from edgetune.training.duration import TRIAL_STEPS, TimeTrial, TrainingTime, duration, predicted_time, tokens_left
from edgetune.training.loop import train


def recipe_of(folder: Path, base: Path, **keys: object) -> Recipe:
    rows = [{"text": f"turn on the light {number}", "label": ("on", "off")[number % 2]} for number in range(40)]
    adapters = {"command": adapter_of({"name": "lora", "target_modules": "all-linear"})}
    return make_recipe(folder, base, adapters, data={"rows.jsonl": rows}, training={"max_steps": None}, **keys)


def told(steps: int, left: float, later: float, *, seconds: float = 0.5) -> list[str]:
    """What a trial says whose first two steps take ten times as long."""
    made, now, lines = TimeTrial("reply", left, later), 0.0, []
    for step in range(steps):
        now += seconds * (10 if step < 2 else 1)
        lines.append(made.step(100, now))
    return [line for line in lines if line is not None]


def test_the_time_left_is_reported_once_after_ten_steps() -> None:
    assert told(TRIAL_STEPS - 1, 13_000, 0) == []
    assert told(40, 13_000, 0) == ["reply: about 1 min left at 200 tokens/s"]
    assert told(40, 13_000, 240_000) == [
        "reply: about 1 min left at 200 tokens/s, 21 min including the training runs after it"
    ]


def test_no_time_left_is_reported_near_the_end_of_a_training() -> None:
    assert told(10, 1000, 0) == []
    assert told(10, 1000, 24_000) == [
        "reply: about 0 s left at 200 tokens/s, 2 min including the training runs after it"
    ]


def test_without_elapsed_time_no_time_left_is_reported() -> None:
    assert told(20, 13_000, 0, seconds=0) == []


def test_tokens_are_those_of_all_steps_and_half_of_the_validation() -> None:
    work = job("lora", max_steps=6, evals=2)
    rows, validation = sum(len(row.tokens) for row in work.train), sum(len(row.tokens) for row in work.validation)
    # Six steps of 8 of the 24 rows are two epochs.
    assert tokens_left(work.train, work.validation, work.training) == 2 * rows + 2 * validation / 2
    assert tokens_left(work.train, work.validation, work.training, 3) == rows + validation / 2
    assert tokens_left(work.train, work.validation, work.training, 6) == 0


@pytest.mark.parametrize(
    ("precision", "cores", "weights", "tokens", "seconds"),
    [
        # quick.yaml of smart-home, SmolLM2-135M, on AVX-512 with bf16.
        ("bf16", 2, 134.5e6, 53_500, 109),
        # SNIPS on the same base, and on one of 0.5B.
        ("bf16", 2, 134.5e6, 11_957, 29),
        ("bf16", 2, 494e6, 10_000, 60),
        # BANKING77 on one core.
        ("bf16", 1, 134.5e6, 10_000, 39),
        # `reply` of quick.yaml on AVX2.
        ("fp32", 2, 134.5e6, 11_602, 53),
        ("int8", 2, 134.5e6, 11_602, 37),
    ],
)
def test_the_predicted_time_includes_what_was_measured(
    precision: str, cores: int, weights: float, tokens: float, seconds: float
) -> None:
    time = predicted_time([(precision, weights * tokens)], cores)
    assert time.min_s < seconds < time.max_s < 3 * time.min_s
    assert predicted_time([(precision, weights * tokens)] * 2, cores).max_s == pytest.approx(2 * time.max_s)


def test_more_cores_than_were_measured_are_faster_at_most_in_proportion() -> None:
    two, eight = (predicted_time([("bf16", 1e13)], cores) for cores in (2, 8))
    assert (eight.min_s, eight.max_s) == (two.min_s / 4, two.max_s)
    assert (str(two), str(TrainingTime(100, 110))) == ("about 2 min to 4 min", "about 2 min")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (61, "2 min"), (840, "14 min"), (7800, "2 h 10 min")]
)
def test_a_duration_is_rounded_up(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_training_reports_its_time_left(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    progress = Listening()
    work = job("lora", max_steps=40, evals=1)
    train(load_torch(tiny_base("llama"), torch.float32), work, tmp_path, progress, later=1e9)
    (line,) = progress.lines
    assert re.fullmatch(r"reply: about .+ left at \d+ tokens/s, .* including the training runs after it", line)


def test_a_trial_reports_speed_and_time_and_leaves_no_files(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"))
    planned = plan_build(recipe)
    unknown = replace(planned, plan=replace(planned.plan, source=None))
    plan, found = trial.run(recipe, unknown, tmp_path / "home", Listening())
    assert plan.source == planned.plan.source
    assert found["tokens_per_s"] > 0 and found["training_s"] >= 0
    assert re.fullmatch(r"training takes about .+ at the \d+ tokens/s of command", found["summary"])
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "rows.jsonl"}


def test_a_trial_says_which_trainings_it_leaves_out(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    domain = {"data": {"train": str(write_rows(tmp_path / "texts.jsonl", [{"text": "a light " * 40}] * 9))}}
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), domain=domain)
    _, found = trial.run(recipe, plan_build(recipe), tmp_path / "home", Listening())
    assert found["summary"].endswith(" tokens/s of command, without continued pretraining")


def test_an_encoder_has_no_trial(tiny_encoder: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_encoder("bert"), task="text-classification", targets=["onnx"])
    with pytest.raises(UsageError, match="--trial does not work for task text-classification"):
        trial.run(recipe, plan_build(recipe), tmp_path / "home", Listening())
