"""The states after an adapter's training prompts: the file, and the similarity of other prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.checked_file import write_checked
from edgetune_runtime.inference.similarity import (
    KIND,
    TrainingPrompts,
    compared_tokens,
    read_prompts,
    write_prompts,
)

RNG = np.random.default_rng(0)
HEAD = RNG.normal(size=(2000, 32)).astype(np.float32)
BASIS = np.linalg.pinv(HEAD[compared_tokens(len(HEAD))]).T
STATES = RNG.normal(size=(5, 32)).astype(np.float32)


def test_similarity_is_the_cosine_to_the_nearest_state(tmp_path: Path) -> None:
    write_prompts(tmp_path / "similarity.bin", TrainingPrompts.of(BASIS, list(STATES @ HEAD.T)))
    prompts = read_prompts(tmp_path / "similarity.bin")
    others = RNG.normal(size=(5, 32)).astype(np.float32)
    for state in (*(3 * STATES), *others):
        cosines = STATES @ state / np.linalg.norm(STATES, axis=1) / np.linalg.norm(state)
        assert prompts.similarity(HEAD @ state) == pytest.approx(float(cosines.max()), abs=2e-3)


def test_states_of_a_base_with_another_vocabulary_are_refused() -> None:
    prompts = TrainingPrompts.of(BASIS, list(STATES @ HEAD.T))
    with pytest.raises(VerificationError, match="for another vocabulary than 20"):
        prompts.similarity(np.zeros(20, np.float32))


@pytest.mark.parametrize(
    ("about", "data"),
    [
        ({"tokens": 1, "prompts": 0, "width": 2}, bytes(4)),
        ({"tokens": 1, "prompts": 3, "width": 2}, bytes(8)),
        ({"tokens": 1, "prompts": "many", "width": 2}, bytes(8)),
        ({"tokens": 1, "prompts": 1}, bytes(8)),
        ({"tokens": 1, "prompts": 1, "width": 2}, np.array([1, np.nan, 0, 1], "<f2").tobytes()),
    ],
)
def test_a_file_of_anything_else_is_refused(about: dict[str, object], data: bytes, tmp_path: Path) -> None:
    write_checked(tmp_path / "similarity.bin", KIND, about, memoryview(data))
    with pytest.raises(VerificationError, match="is not a file of training prompts"):
        read_prompts(tmp_path / "similarity.bin")
    (tmp_path / "similarity.bin").write_bytes(b"{}")
    with pytest.raises(VerificationError, match="its checksum or length is wrong"):
        read_prompts(tmp_path / "similarity.bin")
