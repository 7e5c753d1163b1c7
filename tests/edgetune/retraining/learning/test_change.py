"""Changes of scores between two bundles: what counts as worse, in scores and in bits per byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
from edgetune_runtime.errors import UsageError
from trainings import Listening

from edgetune.retraining.learning.change import ScoredSet, change_between, sets_of
from edgetune.tasks.data import TaskRow
from edgetune.tasks.evaluation import ScoredRow


def scored_set(*scores: float, first: int = 0, too_long: int = 0) -> ScoredSet:
    answers = [(f"rows.jsonl:{first + n}", score) for n, score in enumerate(scores)]
    rows = [ScoredRow(at, "p", "r", f"a{score}", score, conversation=at) for at, score in answers]
    return ScoredSet(rows, too_long, 1.0)


def talk_set(*scores: float) -> ScoredSet:
    """The answers of one conversation."""
    places = [f"rows.jsonl:0{f', message {2 * n}' if n < len(scores) else ''}" for n in range(1, len(scores) + 1)]
    answers = zip(places, scores, strict=True)
    rows = [ScoredRow(at, at, "r", f"a{score}", score, conversation="rows.jsonl:0") for at, score in answers]
    return ScoredSet(rows, 0, 1.0)


def joined(*sets: ScoredSet) -> ScoredSet:
    return ScoredSet([row for each in sets for row in each.details], 0, 1.0)


def read_set(*bits: float) -> ScoredSet:
    answers = [(f"rows.jsonl:{n}", value) for n, value in enumerate(bits)]
    rows = [ScoredRow(at, "p", "r", "", 9.0, bits_per_byte=value, conversation=at) for at, value in answers]
    return ScoredSet(rows, 0, 1.0)


def test_a_score_is_worse_if_it_fell_by_more_than_the_margin() -> None:
    change = change_between(scored_set(1, 1, 1, 1), scored_set(1, 1, 1, 0))
    assert (change.before, change.after, change.error) == (1.0, 0.75, 0.25)
    assert not change.is_worse() and change.is_worse(0.5) and not change.is_worse(2)
    assert change_between(scored_set(1, 1), scored_set(0, 0)).is_worse()
    assert not change_between(scored_set(0, 0), scored_set(1, 1)).is_worse(0)
    assert change.text(change.after) == "75.0%" and change.difference == "-25.0 ± 25.0 points"


def test_one_lost_answer_is_not_worse_among_any_number() -> None:
    for rows in range(2, 120):
        for place in {0, rows // 2, rows - 1}:
            lost = [float(row != place) for row in range(rows)]
            assert not change_between(scored_set(*[1] * rows), scored_set(*lost)).is_worse(), f"{place} of {rows}"


def test_a_single_row_or_conversation_says_nothing() -> None:
    assert not change_between(scored_set(1), scored_set(0)).is_worse(0)
    assert not change_between(talk_set(1, 1), talk_set(0, 0)).is_worse(0)


def test_the_answers_of_a_conversation_count_as_one() -> None:
    before, after = (joined(talk_set(score, 1), scored_set(1, 1, 0, first=1)) for score in (1, 0))
    change = change_between(before, after)
    assert (change.rows, change.conversations, change.after - change.before) == (5, 4, -0.125)
    assert change.error == pytest.approx(0.125) and not change.is_worse(), "half an answer in one of four"


def test_wrong_answers_that_did_not_change_are_kept() -> None:
    change = change_between(scored_set(0, 0.5, 1), scored_set(0, 0.5, 1))
    assert [answer.after for answer in change.still_wrong] == ["a0"] and change.answers == ()
    assert change_between(read_set(1.0), read_set(1.0)).still_wrong == ()


def test_more_bits_per_byte_are_worse() -> None:
    change = change_between(read_set(1.0, 1.2), read_set(2.0, 2.2))
    assert change.is_loss and change.is_worse() and change.gain == pytest.approx(-1)
    assert change.text(change.after) == "2.100 bits/byte" and change.difference == "+1.000 ± 0.000"
    assert not change_between(read_set(2.0, 2.2), read_set(1.0, 1.2)).is_worse()


def test_only_rows_that_fit_both_bundles_are_compared() -> None:
    change = change_between(scored_set(1, 1, 0), scored_set(0, 1, first=1, too_long=1))
    assert (change.rows, change.left_out, change.before, change.after) == (2, 1, 0.5, 0.5)
    with pytest.raises(UsageError, match="no row fits in the context of both bundles; use shorter rows"):
        change_between(scored_set(1), scored_set(1, first=5, too_long=1))


def test_validation_rows_that_no_metric_scores_are_left_out_beside_other_rows() -> None:
    rows, listening = [TaskRow("x:1", text="lamp")], Listening()
    assert sets_of("home", rows, "test", (), listening) == {"validation": rows}
    assert sets_of("home", rows, "test", rows, listening) == {"validation": rows, "test": rows}
    assert listening.lines == []
    assert sets_of("home", (), "test", rows, listening) == {"test": rows}
    assert listening.lines == ["warning: home: no validation row can be scored, so only the test rows are compared"]
    with pytest.raises(UsageError, match="adapter 'home' has no validation row that can be scored; add some with"):
        sets_of("home", (), "test", (), listening)


def test_conversations_are_those_of_the_bundle_before() -> None:
    before, after = talk_set(1, 1), talk_set(0, 0)
    apart = ScoredSet([replace(row, conversation=row.where) for row in after.details], 0, 1.0)
    change = change_between(before, apart)
    assert (change.conversations, change.before, change.after) == (1, 1, 0)
