from __future__ import annotations

import pytest

from edgetune.comparison.curves import Curve, curves_of
from edgetune.comparison.figures import EngineFigures, TrialResult


def figures(score: float, error: float = 0.02) -> EngineFigures:
    return EngineFigures("low_rank", 10, score, error, 1e-3, 90.0)


def outcome(rows: int, score: float, method: str = "lora") -> TrialResult:
    engines = {"gguf": figures(score)}
    counts = {"rows": 50, "trained_rows": rows}
    return TrialResult(f"{method}-{rows}", method, 4, "done", engines=engines, metric="exact", **counts)


def test_errors_that_halve_when_rows_double_are_estimated_to_halve_again() -> None:
    (curve,) = curves_of([outcome(200, 0.8), outcome(100, 0.6), outcome(400, 0.9)])
    assert (curve.name, curve.rows) == ("lora-r4", [100, 200, 400])
    assert curve.estimate(800) == pytest.approx(0.95)
    scores = "0.600 with 100 rows, 0.800 with 200, 0.900 with 400"
    assert curve.outlook == f"lora-r4: exact {scores}; 800 rows would give about 0.95"


def test_scores_within_one_standard_error_promise_nothing() -> None:
    (curve,) = curves_of([outcome(100, 0.6), outcome(300, 0.61)])
    promise = "the best before; the scores do not show that more rows would help"
    assert curve.outlook.endswith(f"0.610 with 300, within one standard error (0.02) of {promise}")


def test_a_curve_that_is_flat_at_its_end_promises_nothing_either() -> None:
    (curve,) = curves_of([outcome(20, 0.083), outcome(60, 0.633), outcome(180, 0.633)])
    scores = "exact 0.083 with 20 rows, 0.633 with 60, 0.633 with 180, within one standard error (0.02) of the best"
    assert scores in curve.outlook and "would give" not in curve.outlook


def test_a_falling_curve_and_one_of_no_right_answers_are_called_so() -> None:
    (falling,), (flat,) = (curves_of([outcome(30, first), outcome(300, last)]) for first, last in ((0.9, 0.4), (0, 0)))
    assert "0.400 with 300, more than one standard error (0.02) below the best before; the" in falling.outlook
    assert "0.000 with 300, no answer is right; the scores do not show" in flat.outlook


def test_an_estimate_is_at_least_the_best_measured_score_and_below_1() -> None:
    curve = Curve("lora", "exact", 40, [30, 100, 300], [figures(0.2), figures(0.9), figures(1.0)])
    assert curve.outlook.endswith("600 rows would give about 1.00")
    # None of 40 answers is wrong, so about half of one stands for the errors.
    assert 1 - 0.5 / 40 < curve.estimate(600) < 1


def test_one_number_of_rows_and_failed_trials_make_no_curve() -> None:
    failed = TrialResult("vera-30", "vera", 4, "failed", "out of memory")
    assert curves_of([outcome(30, 0.5), outcome(30, 0.5, "dora"), failed]) == []


def test_a_perplexity_is_only_reported() -> None:
    curve = Curve("lora", "perplexity", 40, [30, 100], [figures(9.0), figures(7.0)])
    assert curve.outlook == "lora: perplexity 9.000 with 30 rows, 7.000 with 100"
