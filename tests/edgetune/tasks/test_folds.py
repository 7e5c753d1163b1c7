"""The tasks that are trained without a fold of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from recipes import lights, make_recipe

from edgetune.tasks.data import TaskRow
from edgetune.tasks.folds import fold_tasks
from edgetune.tasks.negatives import given, is_made
from edgetune.tasks.splitting import folds_of
from edgetune.tasks.task import Task, read_task

COLORS = ("red", "warm", "blue")
LABELLED = [{"text": f"turn on the light {n}", "label": COLORS[n % 3]} for n in range(40)]


def task_of(folder: Path, rows: list[dict[str, Any]], **keys: object) -> Task:
    adapter = {"data": {"train": "rows.jsonl", "held_out": 0.1}, **keys}
    return read_task("color", make_recipe(folder, "base", {"color": adapter}, data={"rows.jsonl": rows}))


def test_each_row_is_judged_by_the_one_adapter_that_has_not_learned_it(tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "held_out": 0.1, "augment": True}
    task = task_of(tmp_path, lights(40, COLORS), data=data, confidence_folds=4)
    folds = fold_tasks(task)
    assert [fold.name for fold in folds] == [f"color~{n}" for n in range(1, 5)]
    assert sorted(row.where for fold in folds for row in fold.confidence_rows) == sorted(
        row.where for row in task.train
    )
    assert sum(len(fold.copies) for fold in folds) == 3 * len(task.copies) > 0
    for fold in folds:
        judged = {row.where for row in fold.confidence_rows}
        assert len(judged) == 9
        assert not judged & {row.where for row in [*fold.train, *(copy.source for copy in fold.copies)]}
        # Its own validation rows choose the checkpoint, as that of the adapter that ships.
        assert fold.choosing == task.choosing


def test_texts_that_the_build_makes_stay_on_their_side(tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELLED, out_of_scope=True, confidence_folds=3)
    made = {row.where for row in task.validation if is_made(row)}
    learned = {row.where for row in task.train if is_made(row)}
    assert made and learned
    for fold in fold_tasks(task):
        assert {row.where for row in fold.confidence_rows if is_made(row)} == made
        assert {row.where for row in fold.train if is_made(row)} == learned
        assert fold.compared_rows == given(fold.train)


def test_labels_are_compared_with_training_prompts_though_few_rows_are_held_out(tmp_path: Path) -> None:
    assert task_of(tmp_path / "without", LABELLED).compared_rows == []
    task = task_of(tmp_path, LABELLED, confidence_folds=3)
    assert task.compared_rows == task.train
    assert [fold.compared_rows for fold in fold_tasks(task)] == [fold.train for fold in fold_tasks(task)]


def test_rows_of_one_conversation_are_in_one_fold() -> None:
    rows = []
    for number in range(12):
        asked = {"role": "user", "content": f"lamp {number}"}
        answer, more = {"role": "assistant", "content": f"on {number}"}, {"role": "user", "content": "and off"}
        rows += [TaskRow(f"{number}:1", (asked,), f"on {number}"), TaskRow(f"{number}:2", (asked, answer, more), "off")]
    folds = [{row.where.partition(":")[0] for row in fold} for fold in folds_of(rows, 4, seed=0)]
    assert [len(fold) for fold in folds] == [3, 3, 3, 3]
    assert len(set().union(*folds)) == 12


def test_min_confidence_needs_no_more_validation_rows_with_folds(tmp_path: Path) -> None:
    assert task_of(tmp_path, lights(30), min_confidence=0.5, confidence_folds=3).confidence_rows
    with pytest.raises(UsageError, match=r"3 validation rows give none; give 20 or more, .*, or set confidence_folds"):
        task_of(tmp_path, lights(30), min_confidence=0.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"confidence_folds": 10},
            r"adapters.color.confidence_folds: 11 different .* too few for 10 .* give at least 20",
        ),
        ({"confidence_folds": 1}, "confidence_folds: 1 must be at least 2"),
        ({"confidence_folds": 3, "confidence": False}, "confidence_folds needs confidence: true"),
        ({"confidence_folds": 3, "metric": "rouge_l"}, "has confidence_folds, but rouge_l scores no answer as right"),
        ({"confidence_folds": 3, "start_from": "adapter"}, "confidence_folds does not work with start_from"),
    ],
)
def test_what_folds_do_not_fit_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        fold_tasks(task_of(tmp_path, lights(12, COLORS), **keys))
