"""The states after an adapter's training prompts: the file, and the similarity of other prompts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.checked_file import write_checked
from edgetune_runtime.inference.similarity import (
    KIND,
    MAX_LEAD,
    TrainingPrompts,
    compared_tokens,
    read_prompts,
    write_prompts,
)

RNG = np.random.default_rng(0)
HEAD = RNG.normal(size=(2000, 32)).astype(np.float32)
BASIS = np.linalg.pinv(HEAD[compared_tokens(len(HEAD))]).T
STATES = RNG.normal(size=(5, 32)).astype(np.float32)
LABELS = ("red", "warm", "red", "red", "warm")


def _prompts() -> TrainingPrompts:
    return TrainingPrompts.of(BASIS, zip(LABELS, STATES @ HEAD.T, strict=True))


def test_no_thread_waits_at_full_load_after_a_comparison() -> None:
    """In a process of its own, as threads of other tests may still wait."""
    code = """
import time
import numpy as np
from edgetune_runtime.inference.similarity import TrainingPrompts
ones = np.ones((1024, 576), np.float32)
prompts = TrainingPrompts(ones, ("red",) * 1024, ones, spread=0.1)
# The threads of BLAS wait after their start too.
time.sleep(0.5)
for _ in range(3):
    prompts.similarities(np.ones(2000, np.float32))
begin = time.process_time()
time.sleep(0.05)
assert time.process_time() - begin < 0.02
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_similarity_is_the_cosine_to_the_nearest_state_of_each_label(tmp_path: Path) -> None:
    write_prompts(tmp_path / "similarity.bin", _prompts())
    prompts = read_prompts(tmp_path / "similarity.bin")
    others = RNG.normal(size=(5, 32)).astype(np.float32)
    for state in (*(3 * STATES), *others):
        cosines = STATES @ state / np.linalg.norm(STATES, axis=1) / np.linalg.norm(state)
        nearest = {label: float(cosines[[own == label for own in LABELS]].max()) for label in LABELS}
        assert prompts.similarities(HEAD @ state).nearest == pytest.approx(nearest, abs=2e-3)
    unit = STATES / np.linalg.norm(STATES, axis=1, keepdims=True)
    others_of = [np.delete(unit @ state, place).max() for place, state in enumerate(unit)]
    assert prompts.max_lead == MAX_LEAD
    assert prompts.spread == pytest.approx(float(np.std(others_of)), abs=2e-3)


def test_a_file_without_a_greatest_lead_has_none(tmp_path: Path) -> None:
    """A curve that was fitted without it would call right answers unsure with it."""
    data = np.array([1, 0, 1, 0], "<f2").tobytes()
    about = {"tokens": 1, "labels": ["a"], "width": 2, "spread": 0.1}
    write_checked(tmp_path / "similarity.bin", KIND, about, memoryview(data))
    similarities = read_prompts(tmp_path / "similarity.bin").similarities(np.ones(1, np.float32))
    assert similarities._replace(nearest={"a": 1.0, "b": -1.0}).label_log_odds("a", 0.0) == pytest.approx(30.0)


def test_states_of_a_base_with_another_vocabulary_are_refused() -> None:
    with pytest.raises(VerificationError, match="for another vocabulary than 20"):
        _prompts().similarities(np.zeros(20, np.float32))


@pytest.mark.parametrize(
    ("about", "data"),
    [
        ({"labels": []}, bytes(4)),
        ({"labels": ["a", "b", "c"]}, bytes(8)),
        ({"labels": 1}, bytes(8)),
        ({"width": None}, bytes(8)),
        ({"spread": None}, bytes(8)),
        ({"spread": 0.0}, bytes(8)),
        ({"spread": "nan"}, bytes(8)),
        ({"max_lead": 0}, bytes(8)),
        ({"max_lead": "nan"}, bytes(8)),
        ({}, np.array([1, np.nan, 0, 1], "<f2").tobytes()),
    ],
)
def test_a_file_of_anything_else_is_refused(about: dict[str, object], data: bytes, tmp_path: Path) -> None:
    whole = {"tokens": 1, "labels": ["a"], "width": 2, "spread": 0.1}
    write_checked(tmp_path / "similarity.bin", KIND, {**whole, **about}, memoryview(data))
    with pytest.raises(VerificationError, match="is not a file of training prompts"):
        read_prompts(tmp_path / "similarity.bin")
    (tmp_path / "similarity.bin").write_bytes(b"{}")
    with pytest.raises(VerificationError, match="its checksum or length is wrong"):
        read_prompts(tmp_path / "similarity.bin")
