from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from edgetune_runtime import Sampling, UsageError, VerificationError
from edgetune_runtime.text.sampling import Sampler

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def drawn(
    logits: np.ndarray = LOGITS, recent: tuple[int, ...] = (), count: int = 400, **options: object
) -> Counter[int]:
    sampler = Sampler(Sampling(**{"seed": 0, **options}))
    return Counter(sampler.next(logits, recent) for _ in range(count))


def test_the_default_takes_the_likeliest() -> None:
    assert set(drawn(temperature=0.0)) == {0}


def test_temperature_one_draws_with_the_models_own_probabilities() -> None:
    counts = drawn(**OPEN, count=4000)
    shares = [counts[token] / 4000 for token in range(5)]
    assert shares == pytest.approx([0.5, 0.25, 0.15, 0.07, 0.03], abs=0.03)


def test_a_higher_temperature_flattens() -> None:
    assert drawn(**{**OPEN, "temperature": 5.0})[4] > 2 * drawn(**OPEN)[4]


@pytest.mark.parametrize(
    ("option", "value", "kept"),
    [
        ("top_k", 2, {0, 1}),
        ("top_p", 0.8, {0, 1, 2}),
        ("top_p", 0.01, {0}),
        ("top_p", 0, {0}),
        ("min_p", 0.2, {0, 1, 2}),
        ("min_p", 1, {0}),
    ],
)
def test_each_filter_keeps_the_tokens_that_it_should(option: str, value: float, kept: set[int]) -> None:
    assert set(drawn(**{**OPEN, option: value})) == kept


@pytest.mark.parametrize("options", [{"top_p": 0.9, "min_p": 0.01}, {"top_p": 1.0, "min_p": 0.2}, {"min_p": 1e-6}])
def test_all_tokens_are_filtered_as_if_they_were_sorted(options: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    for spread in (0.5, 3.0, 12.0):
        logits = rng.normal(scale=spread, size=500).astype(np.float32)
        logits[rng.integers(500, size=100)] = -np.inf
        unsorted, in_order = (drawn(logits, top_k=top_k, temperature=1.0, **options) for top_k in (0, 500))
        assert unsorted == in_order


def test_repeat_penalty_damps_recent_tokens_whatever_their_sign() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    assert Sampler(Sampling(repeat_penalty=1.2)).next(logits, [0]) == 1
    assert Sampler(Sampling(repeat_penalty=1.2)).next(logits[2:], [0]) == 1
    assert Sampler(Sampling(repeat_penalty=1.2)).next(logits, []) == 0
    assert Sampler(Sampling(repeat_penalty=1.2)).next(logits, [0, *[3] * 64]) == 0


def test_the_same_seed_gives_the_same_tokens_and_none_gives_others() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.next(LOGITS, []) for _ in range(60)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = LOGITS.copy()
    drawn(logits, recent=(0,), count=5, repeat_penalty=1.5, temperature=1.0)
    assert np.array_equal(logits, LOGITS)


def test_all_wrong_values_are_in_one_error() -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(temperature=-1, top_k=-1, top_p=-0.1, min_p=2, repeat_penalty=0, seed=-1, stop=("",), max_tokens=0)
    named = ["temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop", "max_tokens"]
    assert [name for name in named if name not in str(caught.value)] == []


@pytest.mark.parametrize("wrong", [{"temperature": float("nan")}, {"max_tokens": 1.5}, {"top_k": True}, {"top_p": "1"}])
def test_values_of_a_wrong_kind_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)


def test_one_stop_text_may_stand_alone() -> None:
    assert Sampling(stop="END").stop == Sampling(stop=["END"]).stop == ("END",)


@pytest.mark.parametrize("stop", [5, None, [5], b"END"])
def test_stop_texts_of_a_wrong_kind_are_refused(stop: object) -> None:
    with pytest.raises(UsageError, match=r"stop .* is not a list of up to 64 texts"):
        Sampling(stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-30, 1e308, 10**300])
def test_every_temperature_above_0_draws_a_token(temperature: float) -> None:
    assert set(drawn(**{**OPEN, "temperature": temperature}, count=20)) <= set(range(5))
    if temperature < 1:
        assert set(drawn(**{**OPEN, "temperature": temperature}, count=20)) == {0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 10**400},
        {"repeat_penalty": 1e-300},
        {"repeat_penalty": 1e300},
        {"stop": [str(number) for number in range(150_000)]},
        {"stop": "x" * 257},
    ],
)
def test_values_that_floats_or_time_do_not_allow_are_refused_in_a_short_line(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**wrong)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_one_clear_error(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = value
    with pytest.raises(VerificationError, match="in place of a number"):
        drawn(logits, temperature=temperature)


def test_tokens_that_a_constraint_excludes_are_not_drawn() -> None:
    logits = LOGITS.copy()
    logits[[0, 1]] = -np.inf
    assert set(drawn(logits, **{**OPEN, "temperature": 1e3})) == {2, 3, 4}
