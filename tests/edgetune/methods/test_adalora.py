from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import make_model
from trainings import QUIET, SHORT, VOCABULARY, job, job_of, short_answer

from edgetune import methods
from edgetune.methods.common.base import trainable
from edgetune.training.loop import train

ADALORA = methods.load("adalora")


@pytest.mark.parametrize(("rank", "initial"), [(1, 2), (8, 12), (16, 24)])
def test_the_initial_rank_follows_the_mean_rank(rank: int, initial: int) -> None:
    assert ADALORA.shipped_rank(ADALORA.options(r=rank)) == initial


def test_a_mean_rank_is_all_that_a_training_needs(tmp_path: Path) -> None:
    work = job("adalora", {"r": 16, "target_modules": ["q_proj"]}, max_steps=4, evals=1)
    result = train(make_model("llama", VOCABULARY), work, tmp_path, QUIET)
    assert math.isfinite(result.history[-1].train_loss)


def test_no_checkpoint_ships_before_the_ranks_have_their_mean(tmp_path: Path) -> None:
    # Of another rule than the training rows, so that their loss soon rises.
    held_out = [short_answer(number, shift=7) for number in range(8)]
    options = ADALORA.options(target_r=2, init_r=4)
    settings = {"max_steps": 40, "evals": 20, "batch_size": 4, "patience": 3, "learning_rate": 3e-2}
    work = job_of(ADALORA, options, SHORT[:4], held_out, **settings)
    result = train(make_model("llama", VOCABULARY), work, tmp_path, QUIET)
    assert result.shipped_step >= ADALORA.settled_step(options, 40) == 29
    assert min(point.val_loss for point in result.history) < result.val_loss
    values = [e for name, e in load_file(tmp_path / "adapter/adapter_model.safetensors").items() if "lora_E" in name]
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"init_r": 8}, r"init_r is 8, but ranks are reduced to a mean of 8 \(target_r\); give more than 8, or remove"),
        ({"tinit": 0.5, "tfinal": 0.5}, "tinit 0.5 and tfinal 0.5 leave no steps in .*; their sum must be below 1"),
    ],
)
def test_options_with_which_no_rank_is_reduced_are_refused(options: dict[str, float], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ADALORA.options.model_validate(options)


def test_on_a_base_in_bf16_only_what_is_saved_is_trained(tmp_path: Path) -> None:
    model = ADALORA.attach(make_model("llama", VOCABULARY).bfloat16(), ADALORA.options(), 10)
    ADALORA.save(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name, _ in trainable(model)} == saved.keys()
