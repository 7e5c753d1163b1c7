from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, make_recipe
from trainings import Listening

from edgetune.building.outputs.infer import problem_of
from edgetune.building.outputs.resolve import output_of_task, write_inferred
from edgetune.building.plan import plan_build
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_task

ROWS = [{"prompt": f"light {number}", "completion": {"on": number % 2 == 0}} for number in range(10)]
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}


def recipe_of(folder: Path, output: object, rows: list[dict[str, Any]] = ROWS) -> Recipe:
    (folder / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    return make_recipe(folder, "smollm2-135m", {"light": adapter_of(output=output)}, data={"rows.jsonl": rows})


def resolved(folder: Path, output: object, rows: list[dict[str, Any]] = ROWS) -> tuple[Any, list[str]]:
    progress = Listening()
    task = read_task("light", recipe_of(folder, output, rows))
    found = output_of_task(task)
    if output == "auto":
        write_inferred("light", found, folder / "output", progress)
    return found, progress.lines


def test_auto_infers_a_constraint_and_writes_it_down(tmp_path: Path) -> None:
    found, said = resolved(tmp_path, "auto")
    written = json.loads((tmp_path / "output/light.json").read_text(encoding="utf-8"))
    assert written == json.loads(found.text)
    assert written["properties"] == {"on": {"type": "boolean"}}
    assert str(tmp_path / "output/light.json") in said[0]
    again, _ = resolved(tmp_path, {"schema": "output/light.json", "spacing": "spaced"})
    assert again == found


def test_auto_leaves_free_text_free(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {number}", "completion": f"answer {number}"} for number in range(10)]
    found, said = resolved(tmp_path, "auto", rows)
    assert found is None
    assert "no structure" in said[0]


@pytest.mark.parametrize(
    "form", [' {{"on": {}}}', '{{"on": {}}}\n', '{{"on": [{}, "\\/"]}}', '{{"on":\t{}}}', '{{"on": {}, "\\u20ac": 2}}']
)
def test_auto_refuses_rows_that_all_break_what_it_infers_from_them(tmp_path: Path, form: str) -> None:
    rows = [{"prompt": f"p {number}", "completion": form.format(number)} for number in range(10)]
    message = (
        r"adapters\.light\.output: auto: all completions are JSON in an unusual form: .*rows\.jsonl:\d+ .*; "
        r"write them as json\.dumps\(answer, ensure_ascii=False\) does, without white space around them"
    )
    with pytest.raises(UsageError, match=message):
        resolved(tmp_path, "auto", rows)
    with pytest.raises(UsageError, match=message):
        plan_build(recipe_of(tmp_path, "auto", rows))


def test_auto_takes_rows_of_which_some_escape_letters(tmp_path: Path) -> None:
    rooms = ("küche", "flur") * 10
    rows = [{"prompt": f"{room} {number}", "completion": json.dumps({"r": room})} for number, room in enumerate(rooms)]
    found, _ = resolved(tmp_path, "auto", rows)
    assert found.accepts('{"r": "küche"}')


def test_auto_reads_the_earlier_answers_of_conversations(tmp_path: Path) -> None:
    roles = ("user", "assistant") * 2
    contents = [["light", '{"on": true}', f"room {number}", '{"off": 1}'] for number in range(10)]
    rows = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, row, strict=True)]} for row in contents]
    found, _ = resolved(tmp_path, "auto", rows)
    assert json.loads(found.text)["properties"].keys() == {"on", "off"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"schema": SCHEMA}, {"schema": SCHEMA}),
        ({"schema": "schema.json"}, {"schema": SCHEMA}),
        ({"regex": '\\{"on": (true|false)\\}'}, {"regex": '\\{"on": (true|false)\\}'}),
    ],
)
def test_a_given_constraint_is_checked_against_all_rows(
    tmp_path: Path, output: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert resolved(tmp_path, output)[0].to_json() == expected
    wrong = [*ROWS, {"prompt": "light", "completion": "never"}]
    message = r"light\.output: 1 of 11 completions break the \w+: .*rows\.jsonl:11 'never'"
    with pytest.raises(UsageError, match=message):
        resolved(tmp_path, output, wrong)
    with pytest.raises(UsageError, match=message):
        plan_build(recipe_of(tmp_path, output, wrong))


def test_an_earlier_answer_of_a_conversation_that_breaks_a_constraint_is_named(tmp_path: Path) -> None:
    turns = [("user", "light"), ("assistant", "Which one?"), ("user", "the lamp"), ("assistant", '{"on": true}')]
    talk = {"messages": [{"role": role, "content": text} for role, text in turns]}
    with pytest.raises(UsageError, match=r"1 of 12 completions break the schema: .*, message 2 'Which one\?"):
        resolved(tmp_path, {"schema": "schema.json", "spacing": "spaced"}, [*ROWS, talk])
    talk["messages"][1]["weight"] = 0  # type: ignore[assignment]
    assert resolved(tmp_path, {"schema": "schema.json", "spacing": "spaced"}, [*ROWS, talk])[0] is not None


def test_rows_with_another_spacing_are_told_from_rows_that_break_the_schema(tmp_path: Path) -> None:
    message = "10 of 10 completions are JSON with another spacing than compact: .*; set spacing: spaced, or write"
    with pytest.raises(UsageError, match=message):
        resolved(tmp_path, {"schema": SCHEMA, "spacing": "compact"})


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("jsonish", "'jsonish' is not an output constraint"),
        ({"shema": {}}, "no key 'shema'"),
        ({"schema": "none.json"}, "no file .*none.json"),
        ({"regex": "("}, "regex"),
        ({"schema": SCHEMA, "choices": ["a"]}, "schema and choices"),
    ],
)
def test_an_output_that_cannot_be_is_refused_by_the_recipe(tmp_path: Path, output: Any, message: str) -> None:  # noqa: ANN401 - as above
    with pytest.raises(UsageError, match=message):
        resolved(tmp_path, output)


def test_rows_with_a_text_that_their_prompt_lacks_are_named(tmp_path: Path) -> None:
    form = {"type": "object", "properties": {"name": {"type": "string", "x-from-prompt": True}}, "required": ["name"]}
    rows = [{"prompt": f"play song {n}", "completion": {"name": f"song {n}"}} for n in range(60)]
    assert resolved(tmp_path, {"schema": form}, rows)[0].to_json()["schema"] == form
    inferred, said = resolved(tmp_path, "auto", rows)
    assert json.loads(inferred.text)["properties"] == form["properties"]
    assert said[0].endswith("light.json; 1 of its strings must be texts of the prompt")
    with pytest.raises(UsageError, match="60 of 60 completions are JSON with another spacing than compact"):
        resolved(tmp_path, {"schema": form, "spacing": "compact"}, rows)
    rows[3]["completion"] = {"name": "song 4"}
    message = (
        r"1 of 60 completions have a text that their prompt lacks, where x-from-prompt is true: .*rows\.jsonl:4 .*; "
        "correct these rows, or leave x-from-prompt out"
    )
    with pytest.raises(UsageError, match=message):
        resolved(tmp_path, {"schema": form}, rows)


@pytest.mark.parametrize("share", [0.1, 1])
def test_auto_allows_the_answers_of_copies_that_their_prompts_lack(tmp_path: Path, share: float) -> None:
    rows = [{"prompt": f"please play band {n} now", "completion": {"name": f"band {n}"}} for n in range(60)]
    negatives = {"prompts": [f"is it cold {n}" for n in range(60)], "completion": {"name": "none"}, "share": share}
    data = {"train": "rows.jsonl", "held_out": 0.2, "augment": {"copies": 2, "negatives": negatives}}
    recipe = make_recipe(
        tmp_path, "smollm2-135m", {"light": adapter_of(output="auto", data=data)}, data={"rows.jsonl": rows}
    )
    task = read_task("light", recipe)
    assert len(task.copies) >= 60
    found = output_of_task(task)
    assert found is not None
    assert {problem_of(found, copy.row) for copy in task.copies} == {None}
    (string,) = json.loads(found.text)["properties"].values()
    # Where they are many, texts of the prompt are no rule.
    assert ("anyOf" in string) == (share < 1)


def test_rows_with_tools_need_no_output(tmp_path: Path) -> None:
    tools = [{"name": "set_light"}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "set_light"}}]}
    rows = [{"messages": [{"role": "user", "content": f"{n}"}, call], "tools": tools} for n in range(4)]
    with pytest.raises(UsageError, match=r"adapters\.light\.output: .*rows\.jsonl:\d+ has tools, .*; leave output out"):
        resolved(tmp_path, "auto", rows)
    assert resolved(tmp_path, None, rows)[0] is None
