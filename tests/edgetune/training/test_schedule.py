from __future__ import annotations

import random
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import pytest

from edgetune.objectives.example import Example
from edgetune.recipe.training import TrainingSpec
from edgetune.training.schedule import Schedule, passes, plan

LENGTHS = random.Random(0).choices(range(5, 200), k=203)


def schedule_of(rows: int = len(LENGTHS), **options: object) -> tuple[Schedule, TrainingSpec]:
    training = TrainingSpec.model_validate({"batch_size": 8, "epochs": 3, **options})
    return Schedule(rows, training), training


def example(length: int) -> Example:
    return Example((7,) * length, (True,) * length, 1)


def test_a_plan_takes_each_row_once_an_epoch() -> None:
    schedule, training = schedule_of()
    steps = list(plan(LENGTHS, schedule, training))
    assert (len(steps), schedule.steps, schedule.steps_per_epoch) == (78, 78, 26)
    for epoch in range(3):
        rows = Counter(index for step in steps[26 * epoch : 26 * (epoch + 1)] for index in step)
        assert rows == Counter(range(len(LENGTHS)))


def test_a_plan_follows_from_the_seed() -> None:
    plans = [list(plan(LENGTHS, *schedule_of(seed=seed))) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("first", [0, 1, 25, 26, 27, 51, 60, 61])
def test_a_run_goes_on_with_the_steps_that_it_has_left(first: int) -> None:
    schedule, training = schedule_of(max_steps=61)
    assert list(plan(LENGTHS, schedule, training, first)) == list(plan(LENGTHS, schedule, training))[first:]


def test_a_run_of_very_many_epochs_is_planned_as_it_goes() -> None:
    steps = plan(LENGTHS, *schedule_of(epochs=100_000))
    assert list(islice(steps, 78)) == list(plan(LENGTHS, *schedule_of(epochs=3)))


def test_each_epoch_has_its_own_order() -> None:
    steps = list(plan(LENGTHS, *schedule_of()))
    assert len({tuple(index for step in steps[at : at + 26] for index in step) for at in (0, 26, 52)}) == 3


def test_the_rows_of_a_step_have_like_lengths() -> None:
    def padding(steps: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in step) - LENGTHS[i] for step in steps for i in step)

    at_random = random.Random(1).sample(range(len(LENGTHS)), len(LENGTHS))
    chunks = [at_random[i : i + 8] for i in range(0, len(at_random), 8)]
    planned = list(plan(LENGTHS, *schedule_of(epochs=1)))
    assert padding(planned) < padding(chunks) / 5
    # Not in the order of their lengths: that would make the rows of a run's end the longest.
    longest = [max(LENGTHS[i] for i in step) for step in planned]
    assert longest != sorted(longest)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"epochs": 0.5}, 13), ({"epochs": 0.001}, 1), ({"max_steps": 5}, 5), ({"max_steps": 500}, 78)],
)
def test_epochs_and_max_steps_bound_the_steps(options: dict[str, Any], steps: int) -> None:
    schedule, training = schedule_of(**options)
    assert schedule.steps == len(list(plan(LENGTHS, schedule, training))) == steps


def test_the_learning_rate_rises_in_the_warmup_and_falls_to_nearly_nothing() -> None:
    schedule, _ = schedule_of(rows=800, epochs=1, warmup=0.1)
    rates = [schedule.factor(step) for step in range(schedule.steps)]
    assert rates[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert all(before > after for before, after in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3


def test_without_warmup_the_first_step_takes_the_whole_rate() -> None:
    assert schedule_of(warmup=0)[0].factor(0) == 1.0


@pytest.mark.parametrize(
    ("form", "expected"),
    [("linear", [1.0, 0.75, 0.5, 0.25]), ("constant", [1.0] * 4), ("cosine", [1.0, 0.8536, 0.5, 0.1464])],
)
def test_schedules_have_their_forms(form: str, expected: list[float]) -> None:
    schedule, _ = schedule_of(rows=32, epochs=1, warmup=0, schedule=form)
    assert [schedule.factor(step) for step in range(4)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "evals"),
    [
        ({"epochs": 1, "evals": 4}, [25, 50, 75, 100]),
        ({"epochs": 1, "evals": 3}, [33, 66, 100]),
        # At least one an epoch.
        ({"epochs": 3, "evals": 2}, [100, 200, 300]),
        ({"epochs": 1, "evals": 1}, [100]),
        # No more than there are steps.
        ({"max_steps": 3, "evals": 8}, [1, 2, 3]),
        ({"max_steps": 1, "evals": 8}, [1]),
    ],
)
def test_validation_passes_are_spread_over_the_run(options: dict[str, Any], evals: list[int]) -> None:
    assert sorted(schedule_of(rows=800, **options)[0].evals) == evals


@pytest.mark.parametrize("steps", range(1, 40))
def test_a_run_ends_with_a_validation_pass(steps: int) -> None:
    evals = schedule_of(rows=800, max_steps=steps)[0].evals
    assert max(evals) == steps
    assert min(evals) >= 1


def test_a_step_is_split_into_passes_by_tokens() -> None:
    examples = [example(length) for length in (1500, 1500, 1500, 2596, 1, 5000, 10, 4086)]
    split = list(passes(examples, 4096))
    assert [[len(item.tokens) for item in group] for group in split] == [
        [1500, 1500], [1500, 2596], [1], [5000], [10, 4086],
    ]  # fmt: skip
    assert [item for group in split for item in group] == examples
    # A tenth of the shared tokens counts in each row.
    alike = list(passes([example(1100)] * 20, 4096, shared=1000))
    assert [len(group) for group in alike] == [15, 5]
    assert list(passes([], 4096)) == []
