"""What an adapter's training prompts look like: the file, and the similarity of other prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.checked_file import write_checked
from edgetune_runtime.inference.similarity import KIND, TrainingPrompts, read_prompts, write_prompts

RNG = np.random.default_rng(0)
ROWS = list(RNG.normal(size=(5, 1000)).astype(np.float32))


def test_a_training_prompt_is_as_similar_as_can_be_and_others_are_not(tmp_path: Path) -> None:
    write_prompts(tmp_path / "similarity.bin", TrainingPrompts.of(ROWS))
    prompts = read_prompts(tmp_path / "similarity.bin")
    assert [prompts.similarity(3 * row) for row in ROWS] == pytest.approx([1] * 5, abs=1e-3)
    assert max(prompts.similarity(row) for row in RNG.normal(size=(5, 1000)).astype(np.float32)) < 0.5


def test_a_vocabulary_may_be_smaller_than_the_tokens_that_are_compared() -> None:
    assert TrainingPrompts.of([row[:20] for row in ROWS]).similarity(ROWS[0][:20]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("about", "data"),
    [
        ({"prompts": 0}, b""),
        ({"prompts": 3}, bytes(8)),
        ({"prompts": "many"}, bytes(8)),
        ({}, bytes(8)),
        ({"prompts": 2}, np.array([1, np.nan, 0, 1], "<f2").tobytes()),
    ],
)
def test_a_file_of_anything_else_is_refused(about: dict[str, object], data: bytes, tmp_path: Path) -> None:
    write_checked(tmp_path / "similarity.bin", KIND, about, memoryview(data))
    with pytest.raises(VerificationError, match="does not have training prompts"):
        read_prompts(tmp_path / "similarity.bin")
    (tmp_path / "similarity.bin").write_bytes(b"{}")
    with pytest.raises(VerificationError, match="not those that were written"):
        read_prompts(tmp_path / "similarity.bin")
