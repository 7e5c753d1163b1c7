from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import VerificationError
from edgetune_runtime.inference.routing.classifier import (
    PromptClassifier,
    probabilities,
    read_classifiers,
    write_classifiers,
)
from edgetune_runtime.inference.routing.features import count_buckets, features
from hypothesis import given
from hypothesis import strategies as st

BUCKETS = 64
TASKS = {"generate": ("lamp", "song"), "classify": ("mood",)}


def classifier_of(tasks: int) -> PromptClassifier:
    rng = np.random.default_rng(tasks)
    values = rng.normal(0, 3, (tasks + 2, BUCKETS))
    return PromptClassifier(
        np.abs(values[0]).astype(np.float16), values[1:-1].T.astype(np.float16), values[-1, :tasks].astype(np.float32)
    )


@pytest.fixture
def classifiers() -> dict[str, PromptClassifier]:
    return {call: classifier_of(len(names)) for call, names in TASKS.items()}


def test_case_digits_and_width_make_no_difference() -> None:
    assert count_buckets("Lamp 12 ON", BUCKETS) == count_buckets("lamp 97 \uff4f\uff4e", BUCKETS)


def test_each_chinese_character_counts_as_a_word() -> None:
    common = count_buckets("打开灯", 1 << 20).keys() & count_buckets("关上厨房的灯", 1 << 20).keys()
    assert common


@given(st.text(max_size=5000))
def test_any_text_has_bounded_features_and_probabilities(text: str) -> None:
    found = features(count_buckets(text, BUCKETS), np.ones(BUCKETS, np.float16))
    assert np.square(found.values).sum() <= 1 + 1e-5
    chances = probabilities(classifier_of(3).log_odds(text))
    assert (chances >= 0).all()
    assert chances.sum() <= 1 + 1e-9


def test_a_long_text_is_read_at_its_beginning_and_end() -> None:
    middle = "x " * 5000
    assert count_buckets(f"turn on {middle} the lamp", BUCKETS) != count_buckets(f"{middle}", BUCKETS)
    assert count_buckets(f"on {middle} y {middle} off", BUCKETS) == count_buckets(
        f"on {middle} z {middle} off", BUCKETS
    )


def test_probabilities_of_large_odds_are_numbers() -> None:
    odds = np.array([[1e4, -1e4], [-np.inf, -1e4], [1e4, 1e4]], np.float32)
    np.testing.assert_allclose(probabilities(odds), [[1, 0], [0, 0], [0.5, 0.5]])


def test_classifiers_survive_their_file(classifiers: dict[str, PromptClassifier], tmp_path: Path) -> None:
    write_classifiers(tmp_path / "router.bin", classifiers)
    for call, found in read_classifiers(tmp_path / "router.bin", TASKS).items():
        np.testing.assert_array_equal(found.log_odds("the lamp"), classifiers[call].log_odds("the lamp"))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\x07", lambda _: b"{}\n"])
def test_a_damaged_file_is_refused(
    classifiers: dict[str, PromptClassifier], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "router.bin"
    write_classifiers(path, classifiers)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VerificationError, match="not a router"):
        read_classifiers(path, TASKS)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ({"generate": ("lamp", "song")}, "for the calls generate, classify"),
        ({"generate": ("lamp", "song", "more"), "classify": ("mood",)}, "2 biases for 3 tasks"),
        ({"generate": ("lamp",), "classify": ("mood",)}, "2 biases for 1 tasks"),
    ],
)
def test_a_file_of_other_tasks_is_refused(
    classifiers: dict[str, PromptClassifier], tmp_path: Path, tasks: dict[str, tuple[str, ...]], reason: str
) -> None:
    write_classifiers(tmp_path / "router.bin", classifiers)
    with pytest.raises(VerificationError, match=reason):
        read_classifiers(tmp_path / "router.bin", tasks)


def test_values_that_are_not_finite_are_refused(classifiers: dict[str, PromptClassifier], tmp_path: Path) -> None:
    classifiers["classify"].weights[3] = np.nan
    write_classifiers(tmp_path / "router.bin", classifiers)
    with pytest.raises(VerificationError, match="values that are not finite"):
        read_classifiers(tmp_path / "router.bin", TASKS)
