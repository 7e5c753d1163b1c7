from __future__ import annotations

import pytest
from edgetune_runtime.decoding.batch_cost import BatchCost

COST = BatchCost({2: 1.5, 4: 2.0, 8: 3.0})


@pytest.mark.parametrize(("tokens", "cost"), [(1, 1.0), (2, 1.5), (3, 1.75), (8, 3.0), (12, 4.0)])
def test_costs_lie_on_lines_between_those_measured(tokens: int, cost: float) -> None:
    assert COST.of(tokens) == pytest.approx(cost)


@pytest.mark.parametrize(
    ("chances", "count"),
    [
        ([], 0),
        ([0.4, 0.1], 0),
        ([0.9, 0.8, 0.7], 3),
        # The fourth step costs little once three are paid for, the first alone is not worth it.
        ([0.45, 0.44, 0.43, 0.01], 3),
        ([1.0] * 7, 7),
    ],
)
def test_a_draft_is_cut_where_a_token_costs_least(chances: list[float], count: int) -> None:
    assert COST.worthwhile(chances) == count


def test_a_large_vocabulary_raises_the_cost_of_drafts_but_not_of_forced_tokens() -> None:
    large = BatchCost({2: 1.5, 4: 2.0, 8: 3.0}, {2: 2.0, 4: 4.0}, excess=0.5)
    assert large.of(4) == COST.of(4)
    assert large.of(4, drafted=3) == pytest.approx(2.0 + 0.5 * 3.0)
    chances = [0.8, 0.7, 0.6]
    assert large.worthwhile(chances) < COST.worthwhile(chances) == 3


def test_certain_tokens_make_drafts_cheaper() -> None:
    assert COST.worthwhile([0.5], certain=3) == 1
    assert COST.worthwhile([0.5]) == 0
