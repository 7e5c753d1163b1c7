from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, make_recipe

from edgetune.building.routing.prompts import prompts_of
from edgetune.recipe.rows import Rows
from edgetune.tasks.negatives import GENERAL_REQUESTS
from edgetune.tasks.task import Task, read_task

COLORS = ("red", "warm")
ROWS = [{"text": f"make the lamp number {n} {COLORS[n % 2]}", "label": COLORS[n % 2]} for n in range(40)]
SONGS = [{"prompt": f"play {n} songs by the band", "completion": str(n)} for n in range(20)]
SHARED = [*SONGS, {"prompt": f"{ROWS[0]['text'].upper()}!", "completion": "1"}]


def task_with(
    folder: Path, scope: object = True, rows: Sequence[Mapping[str, Any]] = ROWS, **others: Sequence[Mapping[str, Any]]
) -> Task:
    data = {"color": rows, **others}
    keys: dict[str, dict[str, Any]] = {"color": {"out_of_scope": scope}}
    adapters = {name: adapter_of(train=f"{name}.jsonl", held_out=0.2, **keys.get(name, {})) for name in data}
    files = {f"{name}.jsonl": own for name, own in data.items()}
    return read_task("color", make_recipe(folder, "base.gguf", adapters, data=files))


def test_a_task_gets_rows_that_none_of_its_labels_fits(tmp_path: Path) -> None:
    task = task_with(tmp_path, songs=SONGS)
    assert task.labels == (*COLORS, "out_of_scope")
    learned, judged = (
        [row for row in rows if row.completion == "out_of_scope"] for rows in (task.train, task.validation)
    )
    assert (len(task.train), len(learned), len(task.validation), len(judged)) == (32 + 16, 16, 8 + 30, 30)
    texts = [row.messages[0]["content"] for row in (*learned, *judged) if row.messages]
    assert len(set(texts)) == 46
    for rows in (learned, judged):
        own = {row.prompt for row in rows}
        assert own & {*GENERAL_REQUESTS} and own & {row["prompt"] for row in SONGS} and own - {*GENERAL_REQUESTS}
    assert not set(texts) & {row["text"] for row in ROWS}


def test_those_for_validation_are_the_same_for_other_training_rows_and_many_of_those_make_no_more(
    tmp_path: Path,
) -> None:
    rows = [{"text": f"paint wall {n} {COLORS[n % 2]}", "label": COLORS[n % 2]} for n in range(400)]
    made = []
    for count in (10, 40):
        data = {"train": "color.jsonl", "validation": "more.jsonl", "rows": count}
        adapters = {"color": {"data": data, "out_of_scope": True}}
        files = {"color.jsonl": ROWS, "more.jsonl": rows}
        task = read_task("color", make_recipe(tmp_path / str(count), "base.gguf", adapters, data=files))
        assert len(task.train) == 1.5 * count
        made.append([row.prompt for row in task.validation[400:]])
    assert made[0] == made[1] != []


def test_some_for_validation_are_nearly_of_the_task(tmp_path: Path) -> None:
    asked = ["where is my new card", "please change that pin now", "how much does it cost", "freeze everything at once"]
    rows = [{"text": f"{text} {n}", "label": f"label {kind}"} for n in range(10) for kind, text in enumerate(asked)]
    task = task_with(tmp_path, rows=rows)
    begins = tuple(" ".join(text.split()[:3]) for text in asked)
    mixed = [row.prompt for row in task.validation[8:] if row.prompt.startswith(begins)]
    assert 3 <= len(mixed) <= 10
    assert not {*mixed} & {row["text"] for row in rows}
    assert all(row.prompt not in mixed for row in task.train)


def test_the_same_rows_and_seed_make_the_same_rows(tmp_path: Path) -> None:
    one, other = (task_with(tmp_path / name, songs=SONGS) for name in "ab")
    assert [row.messages for row in one.train] == [row.messages for row in other.train]


def test_adapters_that_are_not_trained_are_other_tasks_all_the_same(tmp_path: Path) -> None:
    files = {"color.jsonl": ROWS, "songs.jsonl": SONGS}
    adapters = {
        "color": adapter_of(train="color.jsonl", out_of_scope=True),
        "songs": {"data": {"train": "songs.jsonl", "augment": {"negatives": {"completion": "0"}}}},
    }
    recipe = make_recipe(tmp_path, "base.gguf", adapters, data=files)
    for name in adapters:
        assert read_task(name, recipe.only([name])) == read_task(name, recipe)
    with pytest.raises(UsageError, match="and the recipe no other adapter"):
        read_task("songs", recipe.model_copy(update={"adapters": {"songs": recipe.adapters["songs"]}}))


def test_a_task_that_is_asked_the_same_is_no_example_of_what_is_out_of_scope(tmp_path: Path) -> None:
    task = task_with(tmp_path, songs=SHARED)
    texts = {row.messages[0]["content"] for row in (*task.train, *task.validation) if row.messages}
    assert not texts & {row["prompt"] for row in SHARED}
    augment = {"copies": 1, "negatives": {"completion": "red", "prompts": ["hello"], "share": 1}}
    adapters = {
        "color": {"data": {"train": "color.jsonl", "augment": augment}},
        "songs": adapter_of(train="songs.jsonl"),
    }
    files = {"color.jsonl": ROWS, "songs.jsonl": SHARED}
    copies = read_task("color", make_recipe(tmp_path, "base.gguf", adapters, data=files)).copies
    assert [copy.row.prompt for copy in copies if copy.changes == ("negative",)] == ["hello"]


def test_rows_may_have_the_label_of_texts_out_of_scope(tmp_path: Path) -> None:
    rows = [*ROWS, *({"text": f"what is {n} by two", "label": "other"} for n in range(10))]
    task = task_with(tmp_path, {"label": "other", "refused": 0.1}, rows)
    assert task.labels == ("other", *COLORS)
    known = task.in_scope([*task.train, *task.validation])
    assert {row.completion for row in known} == set(COLORS)


def test_rows_for_the_confidence_get_those_for_validation_which_choose_nothing(tmp_path: Path) -> None:
    sure = [{"text": f"paint wall {n} {COLORS[n % 2]}", "label": COLORS[n % 2]} for n in range(30)]
    task = task_with_confidence(tmp_path / "known", sure)
    made = [row.prompt for row in task.validation[8:]]
    assert [row.prompt for row in task.confidence_rows[30:]] == made != []
    assert list(task.choosing) == list(task.validation[:8])

    own = task_with_confidence(tmp_path / "own", [*sure, *({"text": text, "label": "out_of_scope"} for text in made)])
    assert len(own.confidence_rows) == 30 + len(made)
    assert list(own.choosing) == list(own.validation[:8])
    assert not {*made} & {row.prompt for row in (*own.train, *own.validation)}


def task_with_confidence(folder: Path, sure: Sequence[Mapping[str, Any]]) -> Task:
    data = {"train": "color.jsonl", "held_out": 0.2, "confidence": "sure.jsonl"}
    adapters = {"color": {"data": data, "out_of_scope": True}}
    files = {"color.jsonl": ROWS, "sure.jsonl": sure}
    return read_task("color", make_recipe(folder, "base.gguf", adapters, data=files))


def test_none_has_the_text_of_a_row_that_is_kept_apart(tmp_path: Path) -> None:
    apart = Rows.of("apart", [{"text": f"{text.upper()}!", "label": "red"} for text in GENERAL_REQUESTS[::2]])
    recipe = make_recipe(tmp_path, "base.gguf", {"color": adapter_of(out_of_scope=True)}, data={"rows.jsonl": ROWS})
    spec = recipe.adapters["color"]
    spec = spec.model_copy(update={"data": spec.data.keeping_apart(apart)})
    task = read_task("color", recipe.model_copy(update={"adapters": {"color": spec}}))
    general = {*GENERAL_REQUESTS} & {row.prompt for row in (*task.train, *task.validation)}
    assert general and general <= {*GENERAL_REQUESTS[1::2]}


def test_a_router_does_not_learn_them(tmp_path: Path) -> None:
    prompts = prompts_of(task_with(tmp_path, songs=SONGS))
    assert {*prompts.train, *prompts.validation} == {row["text"] for row in ROWS}


def test_a_task_without_labels_has_no_scope(tmp_path: Path) -> None:
    rows = [{"prompt": f"count to {n}", "completion": {"to": n}} for n in range(10)]
    with pytest.raises(UsageError, match="'color' has out_of_scope, but no labels: its metric is json; set labels or"):
        task_with(tmp_path, rows=rows)
    odd = {"text": "count to nine"}
    with pytest.raises(UsageError, match=r"1 of \d+ rows have no label, such as .*; correct these rows"):
        task_with(tmp_path, rows=[*ROWS, odd])
