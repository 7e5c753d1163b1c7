from __future__ import annotations

import numpy as np
import pytest
from edgetune_runtime.inference.confidence import confidence

from edgetune.tasks.confidence import MIN_ROWS, RatedAnswer, bins_of, calibration_error, fit_curves


def answers_of(count: int, slope: float, offset: float, kind: str = "value", seed: int = 0) -> list[RatedAnswer]:
    """Answers that are right as often as a curve says."""
    random = np.random.default_rng(seed)
    odds = random.normal(4, 4, count)
    chances = 1 / (1 + np.exp(-slope * odds - offset))
    right = random.random(count) < chances
    return [RatedAnswer(kind, float(one), bool(is_right)) for one, is_right in zip(odds, right, strict=True)]


def test_many_rows_give_the_curve_that_the_answers_follow() -> None:
    (curve,) = fit_curves(answers_of(4000, 0.4, -1)).values()
    assert curve.slope == pytest.approx(0.4, abs=0.05)
    assert curve.offset == pytest.approx(-1, abs=0.2)
    assert curve.error is not None
    assert curve.error < 0.02
    assert sum(rows for _, _, rows in curve.bins) == curve.rows == 4000


def test_each_kind_of_answer_has_its_own_curve() -> None:
    curves = fit_curves([*answers_of(1000, 0.5, 1), *answers_of(1000, 0.5, -3, "nothing", seed=1)])
    assert curves["value"].offset - curves["nothing"].offset == pytest.approx(4, abs=0.8)


def test_too_few_rows_have_no_curve() -> None:
    curves = fit_curves([*answers_of(MIN_ROWS - 1, 1, 0), *answers_of(MIN_ROWS, 1, 0, "nothing")])
    assert (curves["value"].slope, curves["value"].rows) == (None, MIN_ROWS - 1)
    assert curves["nothing"].slope is not None


def test_rows_that_are_all_right_give_a_curve_that_rises() -> None:
    answers = [answer._replace(is_right=True) for answer in answers_of(60, 1, 0)]
    curve = fit_curves(answers)["value"]
    assert curve.slope is not None
    assert 0.2 < curve.slope < 0.6
    assert 2 < curve.offset < 5


def test_few_rows_that_are_all_right_do_not_make_sure_of_more() -> None:
    (curve,) = fit_curves([RatedAnswer("value", 10.0, is_right=True)] * MIN_ROWS).values()
    sure = [confidence({"value": curve}, "value", odds) for odds in (-5.0, 10.0, 130.0)]
    assert sure[1:] == [(MIN_ROWS + 1) / (MIN_ROWS + 2)] * 2
    assert sure[0] is not None and sure[0] < 0.5
    assert curve.bins == ((round(17 / 18, 4), 1.0, MIN_ROWS),)


def test_rows_that_are_all_wrong_give_a_low_confidence_whatever_the_log_odds() -> None:
    answers = [answer._replace(is_right=False) for answer in answers_of(60, 1, 0)]
    curve = fit_curves(answers)["value"]
    assert curve.slope == 0
    assert -6 < curve.offset < -3


def test_log_odds_that_say_nothing_give_the_share_of_right_answers() -> None:
    answers = [answer._replace(log_odds=-answer.log_odds) for answer in answers_of(500, 1, 0)]
    curve = fit_curves(answers)["value"]
    assert curve.slope == 0
    assert 1 / (1 + np.exp(-curve.offset)) == pytest.approx(curve.right, abs=0.01)


def test_the_calibration_error_is_the_mean_distance_of_confidence_and_share() -> None:
    bins = bins_of([0.9, 0.9, 0.92, 0.3, 1.0], [True, True, False, True, True])
    assert [(each.rows, each.right) for each in bins] == [(1, 1.0), (4, 0.75)]
    assert calibration_error(bins) == pytest.approx((0.7 + 4 * (3.72 / 4 - 0.75)) / 5)
