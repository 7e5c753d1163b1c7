"""The tasks that are trained without a fold of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from recipes import lights, make_recipe, thermometers, write_rows

from edgetune.tasks.data import TaskRow
from edgetune.tasks.folds import fold_tasks
from edgetune.tasks.negatives import given, is_made, letters_of
from edgetune.tasks.plain_prompts import answered_prompts
from edgetune.tasks.splitting import folds_of
from edgetune.tasks.task import Task, read_task

COLORS = ("red", "warm", "blue")
LABELLED = [{"text": f"turn on the light {n}", "label": COLORS[n % 3]} for n in range(40)]


def tasks_of(folder: Path, rows: list[dict[str, Any]], **keys: object) -> tuple[Task, list[Task]]:
    """The task of these rows, and those of its folds."""
    adapter = {"data": {"train": "rows.jsonl", "held_out": 0.1}, **keys}
    recipe = make_recipe(folder, "base", {"color": adapter}, data={"rows.jsonl": rows})
    task = read_task("color", recipe)
    return task, fold_tasks(task, recipe)


def test_each_row_is_judged_by_the_one_adapter_that_has_not_learned_it(tmp_path: Path) -> None:
    task, folds = tasks_of(tmp_path, lights(40, COLORS), confidence_folds=4)
    assert [fold.name for fold in folds] == [f"color~{n}" for n in range(1, 5)]
    assert sorted(row.where for fold in folds for row in fold.confidence_rows) == sorted(
        row.where for row in task.train
    )
    for fold in folds:
        judged = {row.where for row in fold.confidence_rows}
        assert len(judged) == 9
        assert not judged & {row.where for row in fold.train}
        # Its own validation rows choose the checkpoint, as that of the adapter that ships.
        assert fold.choosing == task.choosing


def test_changed_copies_have_no_value_of_a_row_that_is_judged(tmp_path: Path) -> None:
    rooms = [f"{first}{second}room" for first in ("bed", "bath", "store", "work", "play") for second in "abcdef"]
    asked = ("please turn on the light in the {}", "dim the lamp of the {}", "is the {} dark")
    rows = [{"prompt": asked[n % 3].format(room), "completion": {"area": room}} for n, room in enumerate(rooms)]
    data = {"train": "rows.jsonl", "held_out": 0.1, "augment": True}
    _, folds = tasks_of(tmp_path, rows, data=data, confidence_folds=4)
    assert all(fold.copies for fold in folds)
    for fold in folds:
        judged = {json.loads(row.completion or "")["area"] for row in fold.confidence_rows}
        assert not judged & {word for row in fold.trained_rows for word in row.turns[0]["content"].split()}


def test_texts_that_the_build_makes_are_no_rows_of_the_fold_with_shuffled_letters(tmp_path: Path) -> None:
    task, folds = tasks_of(tmp_path, LABELLED, out_of_scope=True, confidence_folds=3)
    learned = [row for row in task.train if is_made(row)]
    for fold in folds:
        trained, judged = [row for row in fold.train if is_made(row)], {*map(letters_of, given(fold.validation))}
        assert judged.isdisjoint(map(letters_of, trained))
        assert 0 < len(trained) < len(learned)
        assert fold.compared_rows == given(fold.train)


def test_each_text_for_validation_is_asked_one_of_the_adapters_of_folds(tmp_path: Path) -> None:
    task, folds = tasks_of(tmp_path / "own", LABELLED, out_of_scope=True, confidence_folds=3)
    asked = [row.where for fold in folds for row in fold.confidence_rows if is_made(row)]
    assert sorted(asked) == sorted(row.where for row in task.confidence_rows if is_made(row)) != []
    # Rows of the user that are out of scope are enough.
    rows = [{"text": f"hello {number}", "label": "other"} for number in range(5)]
    write_rows(tmp_path / "sure.jsonl", [*rows, {"text": "turn off the light", "label": "red"}])
    data = {"train": "rows.jsonl", "held_out": 0.1, "confidence": "sure.jsonl"}
    _, folds = tasks_of(tmp_path, LABELLED, data=data, out_of_scope={"label": "other"}, confidence_folds=3)
    assert not any(is_made(row) for fold in folds for row in fold.confidence_rows)


def test_labels_are_compared_with_training_prompts_though_few_rows_are_held_out(tmp_path: Path) -> None:
    assert tasks_of(tmp_path / "without", LABELLED)[0].compared_rows == []
    task, folds = tasks_of(tmp_path, LABELLED, confidence_folds=3)
    assert task.compared_rows == task.train
    assert [fold.compared_rows for fold in folds] == [fold.train for fold in folds]


def test_rows_of_one_conversation_are_in_one_fold() -> None:
    rows = []
    for number in range(12):
        asked = {"role": "user", "content": f"lamp {number}"}
        answer, more = {"role": "assistant", "content": f"on {number}"}, {"role": "user", "content": "and off"}
        rows += [TaskRow(f"{number}:1", (asked,), f"on {number}"), TaskRow(f"{number}:2", (asked, answer, more), "off")]
    folds = [{row.where.partition(":")[0] for row in fold} for fold in folds_of(rows, 4, 0, "exact")]
    assert [len(fold) for fold in folds] == [3, 3, 3, 3]
    assert len(set().union(*folds)) == 12


def test_calls_of_one_prompt_are_judged_by_the_fold_that_has_learned_none(tmp_path: Path) -> None:
    adapter = {"data": {"train": "rows.jsonl", "held_out": 0.1}, "metric": "json", "confidence_folds": 4}
    recipe = make_recipe(tmp_path, "base", {"heat": adapter}, data={"rows.jsonl": thermometers(60, 20)})
    folds = fold_tasks(read_task("heat", recipe), recipe)
    assert sum(len(fold.confidence_rows) for fold in folds) == 54
    for fold in folds:
        assert all(row.turn for row in fold.confidence_rows)
        assert answered_prompts(fold.confidence_rows).isdisjoint(answered_prompts(fold.train))


def test_min_confidence_needs_no_more_validation_rows_with_folds(tmp_path: Path) -> None:
    assert tasks_of(tmp_path, lights(30), min_confidence=0.5, confidence_folds=3)[0].confidence_rows
    with pytest.raises(UsageError, match=r"3 validation rows give none; give 20 or more, .*, or set confidence_folds"):
        tasks_of(tmp_path, lights(30), min_confidence=0.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"confidence_folds": 10},
            r"adapters.color.confidence_folds: 11 different .* too few for 10 .* give at least 20",
        ),
        ({"confidence_folds": 3}, r"adapters.color.confidence_folds: 12 rows are too few for a confidence; give 20 or"),
        ({"confidence_folds": 1}, "confidence_folds: 1 must be at least 2"),
        ({"confidence_folds": 3, "confidence": False}, "confidence_folds needs confidence: true"),
        ({"confidence_folds": 3, "metric": "rouge_l"}, "has confidence_folds, but rouge_l scores no answer as right"),
        ({"confidence_folds": 3, "start_from": "adapter"}, "confidence_folds does not work with start_from"),
    ],
)
def test_what_folds_do_not_fit_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        tasks_of(tmp_path, lights(12, COLORS), **keys)
