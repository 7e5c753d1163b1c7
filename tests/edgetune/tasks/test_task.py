from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, lights, make_recipe, thermometers

from edgetune.tasks.data import read_rows
from edgetune.tasks.plain_prompts import answered_prompts
from edgetune.tasks.task import Task, read_task


def rows_of(folder: Path, rows: int | None, seed: int = 0) -> tuple[list[str], list[str]]:
    """Where the training and the validation rows are with `data.rows`."""
    values = {"command": {**adapter_of(), "data": {"train": "rows.jsonl", "held_out": 0.2, "rows": rows}}}
    data = {"rows.jsonl": lights(40)}
    task = read_task("command", make_recipe(folder, "base.gguf", values, training={"seed": seed}, data=data))
    return [row.where for row in task.train], [row.where for row in task.validation]


def test_fewer_rows_are_part_of_more_and_validation_rows_stay(tmp_path: Path) -> None:
    (few, held_out), (more, others), (whole, same) = (rows_of(tmp_path, rows) for rows in (5, 20, None))
    assert (len(few), len(more), len(whole)) == (5, 20, 32)
    assert few == more[:5] and set(more) <= set(whole)
    assert held_out == others == same
    assert set(few) != set(rows_of(tmp_path, 5, seed=1)[0])
    assert set(rows_of(tmp_path, 100)[0]) == set(whole)


def test_rows_that_all_have_weight_0_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "weight": 0} for row in lights(10)]
    recipe = make_recipe(tmp_path, "base.gguf", {"command": adapter_of()}, data={"rows.jsonl": rows})
    with pytest.raises(
        UsageError, match=r"all 10 rows, such as .*rows.jsonl:\d+, have weight 0, .*; give some of them"
    ):
        read_task("command", recipe)


def test_rows_of_weight_0_are_not_measured_and_name_no_label(tmp_path: Path) -> None:
    rows = [{"text": f"light {n}", "label": ("on", "off")[n % 2]} for n in range(60)]
    rows += [{"text": f"lamp {n}", "label": "oof", "weight": 0} for n in range(30)]
    task = read_task(
        "command", make_recipe(tmp_path, "base.gguf", {"command": adapter_of()}, data={"rows.jsonl": rows})
    )
    assert task.labels == ("off", "on") and (len(task.train), len(task.validation)) == (48, 12)
    assert {row.completion for row in (*task.validation_answers, *task.confidence_rows)} == {"off", "on"}
    # Also with the labels of a bundle.
    assert len(read_rows(str(tmp_path / "rows.jsonl"), labels=["off", "on"])) == 60


def test_a_column_of_weights_that_no_row_has_is_refused(tmp_path: Path) -> None:
    columns = {"prompt": "prompt", "completion": "completion", "weight": "Wieght"}
    adapters = {"command": {"data": {"train": "rows.jsonl", "columns": columns}}}
    data = {"rows.jsonl": [{**row, "Weight": 1} for row in lights(10)]}
    with pytest.raises(UsageError, match=r"no row of .*rows\.jsonl has 'Wieght'; correct .*; did you mean 'Weight'\?"):
        read_task("command", make_recipe(tmp_path, "base.gguf", adapters, data=data))


def test_calls_that_were_learned_give_no_confidence_and_are_doubted(tmp_path: Path) -> None:
    def read(**sources: str) -> Task:
        adapters = {"heat": {"data": {"train": "rows.jsonl", **sources}, "metric": "json"}}
        data = {"rows.jsonl": thermometers(40, 40), "more.jsonl": thermometers(50, 50, first=200)}
        return read_task("heat", make_recipe(tmp_path, "base.gguf", adapters, data=data))

    # Rooms 0 to 39 are asked for with other results.
    task = read(validation="more.jsonl")
    assert len(task.validation_answers) == 50 and len(task.confidence_rows) == 10
    assert "40 of 50 validation rows have the prompt of a training row, such as " in task.doubts[0]
    with pytest.raises(UsageError, match="36 of 50 confidence rows have the prompt of a training row"):
        read(confidence="more.jsonl")


def test_rows_for_the_confidence_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    sure = [{"prompt": f"say {n}", "completion": ("word", "[1]")[n % 2]} for n in range(50)]
    adapters = {"command": {**adapter_of(), "data": {"train": "rows.jsonl", "confidence": "sure.jsonl"}}}
    data = {"rows.jsonl": lights(20, [{"a": 1}]), "sure.jsonl": sure}
    task = read_task("command", make_recipe(tmp_path, "base.gguf", adapters, data=data))
    assert len(task.confidence_rows) == 25
    assert "25 of 50 confidence rows, such as " in task.doubts[0] and "cannot be scored by json" in task.doubts[0]


def test_rows_with_the_same_prompt_do_not_choose_the_checkpoint_and_give_the_confidence(tmp_path: Path) -> None:
    more = [{"prompt": f"{word} {n}", "completion": "ok"} for n in range(120) for word in ("Value", "value")]
    adapters = {"command": {**adapter_of(), "data": {"train": "rows.jsonl", "validation": "more.jsonl"}}}
    data = {"rows.jsonl": lights(20, ["a", "b"]), "more.jsonl": more}
    adapters["command"]["metric"] = "exact"
    task = read_task("command", make_recipe(tmp_path, "base.gguf", adapters, data=data))
    assert len(task.choosing) == len(task.confidence_rows) == 120
    assert answered_prompts(task.choosing).isdisjoint(answered_prompts(task.confidence_rows))


@pytest.mark.parametrize(
    ("metric", "forms"), [("label", "text and label"), ("exact", "prompt and completion"), ("json", "prompt")]
)
def test_plain_texts_are_refused_where_the_metric_compares_answers(metric: str, forms: str, tmp_path: Path) -> None:
    rows = [{"text": f"light {number}"} for number in range(10)]
    recipe = make_recipe(tmp_path, "base.gguf", {"command": adapter_of(metric=metric)}, data={"rows.jsonl": rows})
    told = rf"rows.jsonl:\d+: is plain text, but metric {metric} compares answers; use rows of {forms}"
    with pytest.raises(UsageError, match=told):
        read_task("command", recipe)


def test_rows_that_the_chosen_metric_cannot_score_are_doubted_and_not_scored(tmp_path: Path) -> None:
    orders = [{"prompt": f"lamp {number}", "completion": {"level": number}} for number in range(10)]
    held_out = [{"prompt": "what is this", "completion": "sorry"}, {"prompt": "lamp 50", "completion": {"level": 50}}]
    adapter = {**adapter_of(), "data": {"train": "rows.jsonl", "validation": "more.jsonl"}}
    task = read_task(
        "command",
        make_recipe(tmp_path, "base.gguf", {"command": adapter}, data={"rows.jsonl": orders, "more.jsonl": held_out}),
    )
    assert task.metric == "json"
    assert [row.prompt for row in task.validation_answers] == ["lamp 50"]
    (doubt,) = task.doubts
    assert doubt.startswith("1 of 2 validation rows, such as ") and doubt.endswith("1, cannot be scored by json")


@pytest.mark.parametrize("metric", ["exact", "rouge_l"])
def test_validation_rows_that_are_training_rows_are_doubted_with_each_metric(metric: str, tmp_path: Path) -> None:
    rows = lights(10)
    adapter = {**adapter_of(metric=metric), "data": {"train": "rows.jsonl", "validation": "more.jsonl"}}
    recipe = make_recipe(tmp_path, "base.gguf", {"command": adapter}, data={"rows.jsonl": rows, "more.jsonl": rows[:4]})
    (doubt,) = read_task("command", recipe).doubts
    assert doubt.startswith("4 of 4 validation rows have the prompt of a training row")


def test_the_sample_prompt_is_no_option_of_a_command(tmp_path: Path) -> None:
    held_out = [{"prompt": prompt, "completion": "on"} for prompt in ("-on", " -on", "lamp\n on")]
    adapter = {**adapter_of(), "data": {"train": "rows.jsonl", "validation": "more.jsonl"}}
    data = {"rows.jsonl": lights(10), "more.jsonl": held_out}
    task = read_task("command", make_recipe(tmp_path, "base.gguf", {"command": adapter}, data=data))
    assert task.sample_prompt == "lamp on"


def test_a_system_prompt_that_no_training_row_uses_is_doubted(tmp_path: Path) -> None:
    def doubts(system: str, own: str | None) -> tuple[str, ...]:
        first = [] if own is None else [{"role": "system", "content": own}]
        turns = [({"role": "user", "content": f"on {n}"}, {"role": "assistant", "content": "ok"}) for n in range(9)]
        rows = [{"messages": [*first, *talk]} for talk in turns]
        recipe = make_recipe(tmp_path, "base.gguf", {"command": adapter_of(system=system)}, data={"rows.jsonl": rows})
        return read_task("command", recipe).doubts

    assert doubts("Be brief.", None) == doubts("Be brief.", "Be brief.") == ()
    (doubt,) = doubts("Be brief.", "Be kind.")
    assert doubt.startswith("all training rows have other system prompts than the recipe; ")
