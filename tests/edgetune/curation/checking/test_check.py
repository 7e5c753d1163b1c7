from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.errors import UsageError
from edgetune_runtime.tools.prompts import prompt_tokens
from recipes import adapter_of, write_recipe, write_rows

from edgetune import methods
from edgetune.bases import Base, load_torch
from edgetune.cli.main import main
from edgetune.common.progress import Progress, Step
from edgetune.curation.checking import folds, judging
from edgetune.curation.checking.check import check
from edgetune.curation.checking.clean import write_clean
from edgetune.curation.checking.findings import TOO_LONG, Finding, JudgedRow, LabelEstimate, TaskCheck
from edgetune.curation.checking.judging import judge
from edgetune.curation.checking.page import length_bars
from edgetune.curation.checking.reading import Reader
from edgetune.curation.checking.said_values import with_unsaid_values
from edgetune.objectives.example import Example
from edgetune.recipe.model import Recipe
from edgetune.recipe.training import TrainingSpec
from edgetune.tasks import tokenization
from edgetune.tasks.data import TaskRow, read_rows
from edgetune.tasks.task import read_task
from edgetune.tasks.tokenization import tokenize_rows
from edgetune.training.duration import tokens_left
from edgetune.training.job import TrainingJob

QUIET = Progress(quiet=True)
ROOMS = ("hall", "attic", "study", "den", "loft", "cellar", "porch", "pantry", "garage", "nursery")
ROWS = [TaskRow(f"x:{n}", ({"role": "user", "content": "turn on " * n},), "stop the light") for n in range(1, 6)]
ORDERS = [
    {"prompt": f"turn {state} the lamp in the {room}", "completion": {"do": state, "area": room}}
    for state in ("on", "off")
    for room in ROOMS
]
NO_BASE = "missing.gguf"
ROOM_TOOL = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {"type": "object", "properties": {"area": {"type": "string"}}, "required": ["area"]},
    },
}
TOOL = {
    "type": "function",
    "function": {
        "name": "dim",
        "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}, "required": ["level"]},
    },
}


def checked(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    validation: Any = None,  # noqa: ANN401 - rows
    sure: Any = None,  # noqa: ANN401 - rows
    **adapter: Any,  # noqa: ANN401 - keys of an adapter
) -> TaskCheck:
    """The check of one task with these rows, and those of `sure` for the confidence, without a base."""
    files = {"home-train.jsonl": rows}
    data: dict[str, Any] = {"train": "home-train.jsonl", "held_out": 0.2}
    for split, more in (("validation", validation), ("confidence", sure)):
        if more is not None:
            files[f"home-{split}.jsonl"] = more
            data[split] = f"home-{split}.jsonl"
    path = write_recipe(folder, NO_BASE, {"home": {"data": data, **adapter}}, data=files)
    (found,) = check(Recipe.from_file(path), progress=QUIET)
    return found


def places(found: TaskCheck, kind: str) -> list[list[str]]:
    """The numbers of the lines of each problem of a kind, after the first letter of its file's role."""
    return [[where.rpartition("home-")[2].replace(".jsonl", "") for where in f.where] for f in found.of_kind(kind)]


def test_rows_without_problems_have_no_findings(tmp_path: Path) -> None:
    found = checked(
        tmp_path, ORDERS, validation=[{"prompt": "lamp on, shed", "completion": {"do": "on", "area": "shed"}}]
    )
    assert found.counts == {}
    assert found.rows == {"train": 20, "validation": 1, "confidence": 0, "test": 0}
    assert found.is_estimated


def test_prompts_that_repeat_are_told_from_those_that_nearly_do(tmp_path: Path) -> None:
    again = [
        ORDERS[0],
        {"prompt": "Turn on the lamp in the hall!", "completion": {"area": "hall", "do": "on"}},
        {"prompt": "turn on the lamps in the attic", "completion": ORDERS[1]["completion"]},
    ]
    found = checked(
        tmp_path, [*ORDERS, *again], validation=[{"prompt": "light", "completion": {"do": "on", "area": "den"}}]
    )
    assert places(found, "repeat") == [["train:1", "train:21", "train:22"]], "case, punctuation and order of keys aside"
    assert places(found, "near_repeat") == [["train:2", "train:23"]]
    assert "conflict" not in found.counts


def test_different_answers_to_a_prompt_conflict_only_where_one_is_right(tmp_path: Path) -> None:
    other = {"prompt": "turn on the lamp in the hall", "completion": {"do": "off", "area": "hall"}}
    assert places(checked(tmp_path / "json", [*ORDERS, other]), "conflict") == [["train:1", "train:21"]]
    replies = [{"prompt": row["prompt"], "completion": f"I do it at once, number {n}"} for n, row in enumerate(ORDERS)]
    other = {"prompt": replies[0]["prompt"], "completion": "With the greatest pleasure, of course"}
    near = {"prompt": "turn on the lamps in the hall", "completion": "Light comes to the hall, if you please"}
    found = checked(tmp_path / "replies", [*replies, other], validation=[near])
    assert "conflict" not in found.counts
    assert places(found, "near_shared") == [["train:1", "train:11", "validation:1"]], "whatever the answers"


def test_free_texts_that_repeat_are_no_kinds_of_answers(tmp_path: Path) -> None:
    rows = [{**row, "completion": "At once." if n % 3 else f"It is done, {n}."} for n, row in enumerate(ORDERS)]
    for metric, is_kind in (("rouge_l", False), ("exact", True)):
        found = checked(tmp_path / metric, rows, metric=metric)
        assert (bool(found.balance), "rare" in found.counts) == (is_kind, is_kind)


def test_rows_of_a_test_file_beside_the_training_rows_are_found_in_them(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "home-test.jsonl",
        [
            {"prompt": "Turn on the lamp in the hall", "completion": {"do": "on", "area": "hall"}},
            {"prompt": "please turn on the lamp in the den", "completion": {"do": "on", "area": "den"}},
        ],
    )
    sure = [ORDERS[4], {"prompt": "lamp on, shed", "completion": {"do": "on", "area": "shed"}}]
    found = checked(tmp_path, ORDERS, validation=[ORDERS[3]], sure=sure)
    assert found.rows == {"train": 20, "validation": 1, "confidence": 2, "test": 2}
    assert places(found, "shared") == [["train:1", "test:1"], ["train:4", "validation:1"], ["train:5", "confidence:1"]]
    assert places(found, "near_shared") == [["train:4", "test:2"]]


def test_a_test_file_without_answers_does_not_stop_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "home-test.jsonl"
    write_rows(test, [{"prompt": "lamp on"}, {"prompt": "lamp off"}])
    found = checked(tmp_path, [*ORDERS, ORDERS[0], {"prompt": "hello"}])
    assert places(found, "unusable") == [["train:22"], ["test:1"], ["test:2"]]
    assert places(found, "repeat") == [["train:1", "train:21"]] and found.rows["test"] == 0
    assert main(["data", "check", str(tmp_path / "recipe.yaml"), "--test", f"home={test}"]) == 2
    problem = "has no rows that can be used; 2 cannot be used, as home-test.jsonl:1: has no 'completion'"
    assert problem in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_a_table_whose_first_line_is_a_row_is_named(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("lamp on,light\n" + "".join(f"lamp {n},light\nmusic {n},sound\n" for n in range(6)))
    data = {"train": "rows.csv", "columns": {"prompt": "lamp on", "completion": "light"}}
    (found,) = check(Recipe.from_file(write_recipe(tmp_path, NO_BASE, {"home": {"data": data}})), progress=QUIET)
    (finding,) = found.of_kind("unusable")
    assert finding.where == (f"{table}:1",)
    assert finding.note.startswith("looks like a row, because 'light' is also an answer in other rows; add a header")


def test_texts_that_a_build_makes_are_no_rows(tmp_path: Path) -> None:
    rows = [{"text": f"is it {word} now", "label": "weather" if n % 2 else "time"} for n, word in enumerate(ROOMS)]
    rows.append({"text": "who are you", "label": "none"})
    keys = {"labels": ["weather", "time"], "out_of_scope": {"label": "none"}, "min_confidence": 0.5}
    found = checked(tmp_path, rows, **keys)
    assert sum(found.rows.values()) == len(rows) == sum(sum(counts.values()) for counts in found.balance.values())
    assert "unusable" not in found.counts


@pytest.mark.parametrize("keys", [{}, {"labels": ["weather", "time"]}])
def test_rows_of_all_files_may_have_the_label_of_texts_out_of_scope(tmp_path: Path, keys: dict[str, Any]) -> None:
    rows = [{"text": f"is it {word} now", "label": "weather" if n % 2 else "time"} for n, word in enumerate(ROOMS)]
    others = [{"text": f"{word} you", "label": "none"} for word in ("who are", "hello to", "thank")]
    write_rows(tmp_path / "home-test.jsonl", others[2:])
    found = checked(tmp_path, rows, validation=others[:1], sure=others[1:2], out_of_scope={"label": "none"}, **keys)
    assert found.rows == {"train": 10, "validation": 1, "confidence": 1, "test": 1}
    assert not found.counts.keys() & {"unusable", "rare"}


def test_rows_that_cannot_be_used_are_named_and_the_others_checked(tmp_path: Path) -> None:
    found = checked(tmp_path, [*ORDERS, {"prompt": "hello"}, {"prompt": "", "completion": "x"}])
    assert [(finding.where[0][-2:], finding.note) for finding in found.of_kind("unusable")] == [
        ("21", "has no 'completion'; its keys are prompt"),
        ("22", "prompt is empty"),
    ]
    assert found.rows["train"] + found.rows["validation"] == 20


def test_rows_that_the_chat_template_rejects_are_named_and_the_others_checked(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(tokenizer: Any, messages: list[Any], tools: Any) -> list[int]:  # noqa: ANN401 - as prompt_tokens
        if messages[0]["role"] == "system":
            raise UsageError("the chat template rejects the messages: no system role", "leave it out")
        return prompt_tokens(tokenizer, messages, tools)

    monkeypatch.setattr(tokenization, "prompt_tokens", strict)
    said = (("system", "Be kind."), ("user", "lamp"), ("assistant", json.dumps(ORDERS[0]["completion"])))
    talk = {"messages": [{"role": role, "content": content} for role, content in said]}
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), data={"rows.jsonl": [*ORDERS, talk, ORDERS[0]]})
    (found,) = check(Recipe.from_file(recipe), progress=QUIET)
    assert [(finding.where[0][-2:], finding.note) for finding in found.of_kind("unusable")] == [
        ("21", "the chat template rejects the messages: no system role")
    ]
    assert found.counts["repeat"] == 1 and not found.is_estimated and len(found.tokens) == len(ORDERS) + 2


def test_labels_that_the_recipe_does_not_list_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"is it {word}", "label": "weather" if n % 2 else "time"} for n, word in enumerate(ROOMS)]
    found = checked(tmp_path, [*rows, {"text": "is it late", "label": "tiem"}], labels=["weather", "time"])
    assert "'tiem' is not one of the labels" in found.of_kind("unusable")[0].note
    assert found.balance == {"time": {"train": 4, "validation": 1}, "weather": {"train": 4, "validation": 1}}
    assert next(finding.note for finding in found.of_kind("rare")).startswith("time: 4 in train, 1 in validation")


def test_a_function_counts_in_each_answer_that_calls_it(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("light", "heat", "lock")]

    def row(text: str, *names: str) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
        turns = [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": calls}]
        return {"messages": turns, "tools": tools}

    rows = [row(f"light the {room}", "light") for room in ROOMS] + [row(f"lock {n}", "lock") for n in range(3)]
    rows += [row(f"both {n}", "light", "light", "heat") for n in range(6)]
    written = {"role": "assistant", "content": '<tool_call>\n{"name": "light"}\n</tool_call>'}
    text = {"messages": [{"role": "user", "content": "light up"}, written], "tools": tools}
    assert (
        checked(tmp_path, [*rows, text]).of_kind("misfit")[0].note == "is the text of a call: give it as `tool_calls`"
    )
    found = checked(tmp_path, rows, validation=[row("light it", "light"), row("lock it", "lock")])
    assert found.balance == {
        "light": {"train": len(ROOMS) + 6, "validation": 1},
        "heat": {"train": 6},
        "lock": {"train": 3, "validation": 1},
    }
    assert [finding.note for finding in found.of_kind("rare")] == ["lock: 3 in train, 1 in validation"]


def test_a_row_without_a_label_among_labelled_ones_is_named(tmp_path: Path) -> None:
    rows = [{"text": f"is it {word} now", "label": "weather" if n % 2 else "time"} for n, word in enumerate(ROOMS)]
    found = checked(tmp_path, [*rows, {"text": "what is it"}])
    assert places(found, "misfit") == [["train:11"]]
    task = read_task("home", Recipe.from_file(tmp_path / "recipe.yaml"))
    (doubt,) = task.doubts
    assert task.metric == "exact" and doubt.startswith("1 of 11 rows have no label, such as ")


def test_labels_that_differ_only_in_case_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"{room} lights", "label": ("on", "off")[n % 2]} for n, room in enumerate(ROOMS)]
    found = checked(tmp_path, [*rows, {"text": "light", "label": "On"}], validation=[{"text": "dark", "label": "On"}])
    assert places(found, "misfit") == [["train:11", "validation:1"]]
    assert found.of_kind("misfit")[0].note == "the label 'On' differs only in case or Unicode form from 'on'"
    task = read_task("home", Recipe.from_file(tmp_path / "recipe.yaml"))
    (doubt,) = task.doubts
    assert doubt == "the labels 'On' and 'on' differ only in case or Unicode form, so a right answer may count as wrong"


def test_labels_that_are_the_same_in_another_unicode_form_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"{room} lights", "label": ("caf\u00e9", "off")[n % 2]} for n, room in enumerate(ROOMS)]
    found = checked(tmp_path, [*rows, {"text": "light", "label": "cafe\u0301"}])
    assert places(found, "misfit") == [["train:11"]]


def test_labels_that_are_lists_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"{room} lights", "label": [("hall", "attic")[n % 2], "on"]} for n, room in enumerate(ROOMS)]
    found = checked(tmp_path, rows, metric="label")
    assert [finding.note for finding in found.of_kind("misfit")] == ["labels are lists: each combination is one label"]
    task = read_task("home", Recipe.from_file(tmp_path / "recipe.yaml"))
    assert task.doubts == ('labels are lists, such as ["attic", "on"]: each combination is one label',)


def test_answers_that_break_the_output_are_named(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"do": {"enum": ["on", "off"]}, "area": {"type": "string"}}}
    bad = {"prompt": "dim the hall", "completion": {"do": "dim", "area": "hall"}}
    found = checked(tmp_path, [*ORDERS, bad], output={"schema": schema})
    assert [(f.where[0][-2:], f.note) for f in found.of_kind("misfit")] == [("21", "breaks the schema of the recipe")]
    schema["properties"]["area"] = {"type": "string", "x-from-prompt": True}
    found = checked(
        tmp_path, [*ORDERS, {**bad, "completion": {"do": "on", "area": "attic"}}], output={"schema": schema}
    )
    note = "has a text that its prompt lacks, where x-from-prompt is true"
    assert ("21", note) in [(f.where[0][-2:], f.note) for f in found.of_kind("misfit")]


def test_answers_of_another_form_than_most_are_named(tmp_path: Path) -> None:
    odd = [
        {"prompt": "is the fan on", "completion": "yes, it is"},
        {"prompt": "dim the study", "completion": {"do": "on", "aera": "study"}},
        {"prompt": "dim the fourth", "completion": {"do": "on", "area": 4}},
        {"prompt": "dim the den a lot", "completion": {"do": "on", "area": json.loads("[" * 60 + "]" * 60)}},
    ]
    unseen = [{"prompt": "dim the den", "completion": {"do": "on", "area": "den", "level": 3}}]
    found = checked(tmp_path, [*ORDERS, *ORDERS[::-1], *odd], validation=unseen)
    assert {f.where[0].rpartition("home-")[2]: f.note for f in found.of_kind("misfit")} == {
        "train.jsonl:41": "is not JSON, as 44 of 45 answers are",
        "train.jsonl:42": "has the field aera, which no other answer has; area is meant?",
        "train.jsonl:43": "area is a number, and text in 41 answers",
        "train.jsonl:44": "has more than 50 levels of lists and objects",
        "validation.jsonl:1": "has a form or a value that no training row has",
    }


@pytest.mark.parametrize("form", [" {}", "{}\n", "escaped"])
def test_answers_that_are_written_as_the_training_rows_write_them_are_not_odd(tmp_path: Path, form: str) -> None:
    def written(order: dict[str, Any]) -> dict[str, Any]:
        answer = json.dumps({**order["completion"], "path": "/lamp"})
        return {**order, "completion": answer.replace("/", r"\/") if form == "escaped" else form.format(answer)}

    rows = [written(order) for order in ORDERS]
    assert "misfit" not in checked(tmp_path, rows[:-2], validation=rows[-2:]).counts


def test_values_and_fields_that_loosen_the_schema_for_all_are_named(tmp_path: Path) -> None:
    odd = [
        {"prompt": "darken the attic", "completion": {"do": "offf", "area": "attic"}},
        {"prompt": "make the den darker", "completion": {"do": "dim", "area": "den"}},
        {"prompt": "turn off the lamp of the den", "completion": {"do": "of", "area": "den"}},
        {"prompt": "brighten the lamp in the den", "completion": {"do": "brighten", "area": "den"}},
        {"prompt": "light", "completion": {"do": "on"}},
        {"prompt": "turn on the lamp in the barn", "completion": {"do": "on", "area": "barn"}},
    ]
    found = checked(tmp_path, [*ORDERS * 4, *odd], validation=ORDERS[:1], output="auto")
    assert {f.where[0].rpartition(":")[2]: f.note for f in found.of_kind("misfit")} == {
        "81": "do is 'offf' in no other answer; 'off' is meant?",
        "82": "do is 'dim' in no other answer; the others have 'on', 'off'",
        "83": "do is 'of' in no other answer; 'off' is meant?",
        "85": 'has no area, which 42 of 43 answers with do "on" have',
    }


def test_answers_are_compared_as_json_but_for_a_few_others(tmp_path: Path) -> None:
    other = {"prompt": ORDERS[0]["prompt"], "completion": {"do": "off", "area": "den"}}
    text = {"prompt": "please do it", "completion": "I do not know which lamp you mean"}
    found = checked(tmp_path, [*ORDERS, other, text], output="auto")
    assert (places(found, "misfit"), places(found, "conflict")) == ([["train:22"]], [["train:1", "train:21"]])
    (doubt,) = read_task("home", Recipe.from_file(tmp_path / "recipe.yaml")).doubts
    assert doubt.startswith("1 of 22 answers are not JSON objects or lists, such as ")
    assert doubt.endswith("free text, not JSON")


def talk_about(room: str) -> list[dict[str, str]]:
    answer = json.dumps({"do": "off", "area": room})
    return [{"role": "user", "content": f"turn off the lamp in the {room}"}, {"role": "assistant", "content": answer}]


def test_a_text_that_the_prompt_does_not_have_is_named_where_most_prompts_have_theirs(tmp_path: Path) -> None:
    attic = {"do": "on", "area": "attic"}
    wrong = [{"prompt": "lamp on in the cellar", "completion": attic}]
    prompts = ("turn on the attc lamp", "attics on", "the atticlamp on", "lamp under the roof on", "on under the roof")
    spoken = [{"prompt": prompt, "completion": attic} for prompt in prompts]
    # What an answer is made from is also in the system prompt, and in an earlier answer.
    for earlier in ([{"role": "system", "content": "You are in the attic."}], talk_about("attic")):
        asked = [*earlier, {"role": "user", "content": "lamp on here"}]
        spoken.append({"messages": [*asked, {"role": "assistant", "content": json.dumps(attic)}]})
    assert "misfit" not in checked(tmp_path, [*ORDERS * 2, *spoken]).counts
    assert "misfit" not in checked(tmp_path, [*ORDERS, *wrong]).counts  # too few rows to tell
    found = checked(tmp_path, [*ORDERS * 2, *wrong])
    assert [(f.where[0][-2:], f.note) for f in found.of_kind("misfit")] == [
        ("41", "area is 'attic', which is not in the prompt; in 40 of 41 rows it is")
    ]


def test_a_call_with_a_text_that_only_its_own_message_has_is_named(tmp_path: Path) -> None:
    def calling(prompt: str, room: str) -> dict[str, Any]:
        call = {"function": {"name": "light", "arguments": {"area": room}}}
        said = {"role": "assistant", "content": f"The lamp in the {room}.", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": prompt}, said], "tools": [ROOM_TOOL]}

    rows = [calling(f"light {n} in the {room}", room) for n in range(4) for room in ROOMS]
    found = checked(tmp_path, [*rows, calling("light in the cellar", "attic")])
    assert [(f.where[0][-2:], f.note) for f in found.of_kind("misfit")] == [
        ("41", "area is 'attic', which is not in the prompt; in 40 of 41 rows it is")
    ]


def test_an_answer_with_a_value_that_most_right_rows_have_in_the_prompt_is_less_likely() -> None:
    def row(prompt: str, level: int) -> TaskRow:
        return TaskRow("x:1", ({"role": "user", "content": prompt},), json.dumps({"do": "dim", "level": level}))

    others = [row("to half", 50), row("to a half", 50), row("halfway", 50)]
    rows = [*(row(f"to {n}", n) for n in range(7)), row("darker", 0), row("to 3", 4), row("to 6", 5), *others]
    likely = with_unsaid_values(rows, [*[0.8] * 7, 1, 0.5, 0.4, *[0.6] * 3])
    # "dim" is in no prompt; a level is in seven of the eight prompts of right rows, and 50 has another word.
    assert likely == pytest.approx([*[0.8] * 7, 1, 0.5 * 0.2, 0.4 * 0.2, *[0.6] * 3])
    assert with_unsaid_values([TaskRow("x:1", None, "plain text")], [0.5]) == [0.5]


def test_fields_whose_names_are_data_are_not_taken_for_misspelled(tmp_path: Path) -> None:
    orders = [{"prompt": f"note {n}", "completion": {"prices": {f"lamp{n}": n, "lamp": n}}} for n in range(30)]
    assert "misfit" not in checked(tmp_path, orders, validation=orders[:1]).counts


def test_calls_whose_arguments_break_the_schema_are_named(tmp_path: Path) -> None:
    def talk(number: int, level: object) -> dict[str, Any]:
        call = {"function": {"name": "dim", "arguments": {"level": level}}}
        turns = [{"role": "user", "content": f"dim to {number}"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": turns, "tools": [TOOL]}

    earlier = {**talk(0, 0), "messages": [*talk(8, "eight")["messages"], *talk(7, 7)["messages"]]}
    found = checked(tmp_path, [*(talk(n, n) for n in range(9)), talk(9, "nine"), earlier])
    assert sorted(f.where[0].partition(":")[2] for f in found.of_kind("misfit")) == ["10", "11, message 2"]


def test_the_command_writes_clean_rows_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = {"prompt": "lamp!", "completion": {"do": "on", "area": "den"}, "note": "half an emoji: \ud83d"}
    rows = [*ORDERS, ORDERS[0], {"prompt": "<b>hello"}, last]
    write_rows(tmp_path / "rows-test.jsonl", [ORDERS[2]])
    recipe = str(write_recipe(tmp_path, NO_BASE, data={"rows.jsonl": rows}))
    clean, page = tmp_path / "new" / "clean.jsonl", tmp_path / "new" / "page.html"
    assert main(["data", "check", recipe, "--out", str(clean), "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert "rows that cannot be used: 1\n    rows.jsonl:22; has no 'completion'" in out
    assert out.endswith(f"{clean}: rows left out: 3\n{page}\n")
    assert [row.completion for row in read_rows(str(clean))] == [
        json.dumps(row["completion"]) for row in (*ORDERS[:2], *ORDERS[3:], last)
    ]
    assert json.loads(clean.read_text(encoding="utf-8").splitlines()[-1]) == last
    tags = set[str]()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.add(tag)  # type: ignore[method-assign]
    parser.feed(page.read_text(encoding="utf-8"))
    assert {"svg", "blockquote"} <= tags
    assert not {"script", "b>hello"} & tags
    assert main(["data", "check", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"]["counts"]["unusable"] == 1


def test_the_command_says_what_it_does_not_print_and_what_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"prompt": ORDERS[0]["prompt"], "completion": {"do": "off", "area": "den"}}
    recipe = str(write_recipe(tmp_path, NO_BASE, data={"rows.jsonl": [*ORDERS, *ORDERS[1:6], other]}))
    assert main(["data", "check", recipe, "--out", str(tmp_path / "clean.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "  rows that repeat another one: 5\n" in out and "    and 2 more: see --page or --json\n" in out
    assert out.endswith(": rows left out: 5; to be corrected: prompts with different answers\n")


def test_rows_longer_than_the_context_are_one_bar_and_squeeze_no_others() -> None:
    bars = length_bars([10, 10, 11, 57, 3271], 256)
    long = "more than the context of 256 tokens: 1"
    assert [bar.label for bar in bars if bar.height] == ["10 tokens or more: 3", "56 tokens or more: 1", long]
    assert [bar.is_too_long for bar in bars[-2:]] == [False, True]
    assert [bar.label for bar in length_bars([300], 256)] == [long]


def test_of_rows_that_repeat_the_one_that_is_learned_most_is_written(tmp_path: Path) -> None:
    found, clean = checked(tmp_path, [{**ORDERS[0], "weight": 0.1}, *ORDERS]), tmp_path / "clean.jsonl"
    write_clean(found, Recipe.from_file(tmp_path / "recipe.yaml").adapters["home"].data, clean)
    assert [row.weight for row in read_rows(str(clean))] == [1] * len(ORDERS)


def test_rows_that_repeat_are_in_one_part_of_a_file_and_the_first_is_written(tmp_path: Path) -> None:
    loud = [{**row, "prompt": f"{row['prompt'].upper()}!"} for row in ORDERS]
    found = checked(tmp_path, [*ORDERS, *loud, {**ORDERS[0], "completion": {"do": "off", "area": "den"}}])
    assert "shared" not in found.counts
    data, clean = Recipe.from_file(tmp_path / "recipe.yaml").adapters["home"].data, tmp_path / "clean.jsonl"
    assert write_clean(found, data, clean) == {"repeat": len(ORDERS)}
    assert len({row.prompt.lower().strip("!") for row in read_rows(str(clean))}) == len(ORDERS)


@pytest.mark.parametrize(
    ("good", "problem"),
    [
        (0, "rows.jsonl has no rows that can be used; 3 cannot be used, as rows.jsonl:1: has no 'completion'"),
        (1, "only 1 row cannot be split for validation; 3 cannot be used, as rows.jsonl:2: has no 'completion'"),
    ],
)
def test_where_no_check_is_possible_a_row_that_cannot_be_used_is_named(
    good: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [*ORDERS[:good], *({"prompt": f"do {n}"} for n in range(3))]
    recipe = str(write_recipe(tmp_path, NO_BASE, data={"rows.jsonl": rows}))
    assert main(["data", "check", recipe]) == 2
    assert problem in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_wrong_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, NO_BASE, {"one": adapter_of(), "two": adapter_of()}))
    write_rows(tmp_path / "rows-test.jsonl", ORDERS[:1])
    for options, message in (
        (["--out", "clean.jsonl"], "--out is for the rows of one adapter; add --adapter one"),
        (["--adapter", "one", "--weights"], "--weights needs an estimate of wrong answers, and a file; add --minutes"),
        (["--adapter", "tow"], "no adapter 'tow' in the recipe; did you mean 'two'?"),
        (["--adapter", "one", "--out", str(tmp_path / "rows.jsonl")], "rows.jsonl is a file that this command reads"),
        (["--adapter", "one", "--out", str(tmp_path / "rows-test.jsonl")], "rows-test.jsonl is a file that this"),
        (["--page", recipe], "recipe.yaml is not an .html file, and pages are written as HTML; name it .html"),
        (["--adapter", "one", "--out", "clean.csv"], "clean.csv is not a .jsonl file, and rows are written as JSON"),
        (["--adapter", "one", "--test", "one=gone.jsonl"], "no data file gone.jsonl"),
        (["--adapter", "one", "--test", "two=gone.jsonl"], "test rows of 'two', but only 'one' is checked; leave one"),
        (["--minutes", "0.5"], "--minutes is '0.5', not a number of at least 1"),
    ):
        assert main(["data", "check", recipe, *options]) in (2, 3)
        assert message in capsys.readouterr().err


def test_wrong_answers_are_the_least_likely_ones(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{word} the {thing} in {n}", "completion": {"turn": "on", "stop": "off"}[word]}
        for n in range(12)
        for word in ("turn", "stop")
        for thing in ("lamp", "light")
    ]
    wrong = [5, 17, 30, 44]
    for place in wrong:
        rows[place] = {**rows[place], "completion": {"on": "off", "off": "on"}[rows[place]["completion"]]}
    training = {"max_steps": None, "epochs": 8, "evals": 1, "learning_rate": 1e-2}
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), data={"rows.jsonl": rows}, training=training)
    (found,) = check(Recipe.from_file(recipe), minutes=10, progress=QUIET)
    assert found.estimate is not None
    ranked = [int(row.where.rpartition(":")[2]) - 1 for row in found.estimate.rows]
    assert sorted(ranked) == list(range(len(rows)))
    assert len(set(wrong) & set(ranked[: len(rows) // 4])) >= 3
    assert {finding.own for finding in found.of_kind("wrong_label")} <= {"on", "off"}
    data, clean = Recipe.from_file(recipe).adapters["command"].data, tmp_path / "clean.jsonl"
    named = len(found.of_kind("wrong_label"))
    assert write_clean(found, data, clean)["wrong_label"] == named
    assert len(read_rows(str(clean))) == len(rows) - named
    write_rows(tmp_path / "rows.jsonl", [{**row, "weight": 0.5} for row in rows])
    assert not write_clean(found, data, clean, weighted=True)
    judged = {row.where.rpartition(":")[2]: row for row in found.estimate.rows}
    for row in read_rows(str(clean)):
        own = judged[row.where.rpartition(":")[2]]
        assert row.weight == pytest.approx(own.weight * 0.5, abs=1e-3)
        assert own.own is None or own.weight <= 1


@pytest.mark.parametrize(
    ("right", "limit"),
    [
        # A model that gives most of the answers, and one that hardly knows the task.
        ([1.0] * 60, 0.1),
        ([0.4, 0.2, 0.1] * 20, 0.1 * 0.2**2 / 0.4),
    ],
)
def test_an_answer_is_wrong_that_is_far_less_likely_than_most(right: list[float], limit: float) -> None:
    assert judging._limit(right) == pytest.approx(limit)
    with_wrong = judging._limit([*right, *([1e-5] * 12)])
    assert limit / 4 <= with_wrong <= limit
    assert judging._limit([0.0] * 5) > 0


def test_answers_with_a_field_or_a_label_that_the_model_hardly_knows_are_compared_with_each_other() -> None:
    def row(answer: object) -> TaskRow:
        return TaskRow(
            "x:1", ({"role": "user", "content": "x"},), answer if isinstance(answer, str) else json.dumps(answer)
        )

    known, rare = [0.5] * 20, [2e-3, 1e-3, 3e-3, 2e-3, 1e-3, 1e-7]
    for common, own in (({"do": "dim"}, {"do": "dim", "fades": "slowly"}), ("dim", "fade")):
        rows = [*(row(common) for _ in known), *(row(own) for _ in rare)]
        limits = judging._limits(rows, [*known, *rare])
        called = [likelihood <= limit for likelihood, limit in zip(rare, limits[20:], strict=True)]
        assert called == [False, False, False, False, False, True]
        assert set(limits[:20]) == {judging._limit([*known, *rare])}
        # Too few rows to tell.
        assert len(set(judging._limits([*rows[:20], *rows[22:]], [*known, *rare[2:]]))) == 1


def test_an_earlier_answer_of_a_conversation_conflicts_with_another_rows(tmp_path: Path) -> None:
    def talk(first: str, last: str) -> dict[str, Any]:
        turns = [("user", "lamp"), ("assistant", first), ("user", f"and {last}"), ("assistant", '{"do": "stop"}')]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rows = [talk('{"do": "on"}', "now"), talk('{"do": "off"}', "then")]
    found = checked(tmp_path, [*rows, *ORDERS], validation=[talk('{"do": "dim"}', "so")])
    (conflict,) = places(found, "conflict")
    assert conflict == ["train:1, message 2", "train:2, message 2", "validation:1, message 2"]


def test_an_earlier_turn_that_is_learned_and_a_row_of_another_split_is_shared(tmp_path: Path) -> None:
    turns = [("user", "lamp"), ("assistant", '{"do": "on"}'), ("user", "and now"), ("assistant", '{"do": "stop"}')]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = checked(tmp_path, [talk, *ORDERS], validation=[{"prompt": "Lamp!", "completion": {"do": "on"}}])
    assert places(found, "shared") == [["train:1, message 2", "validation:1"]]
    # Its other turns are worth learning.
    assert write_clean(found, Recipe.from_file(tmp_path / "recipe.yaml").adapters["home"].data, tmp_path / "out") == {}


def test_a_file_of_which_no_row_is_left_is_not_written(tmp_path: Path) -> None:
    found, clean = checked(tmp_path, ORDERS, validation=ORDERS), tmp_path / "clean.jsonl"
    data = Recipe.from_file(tmp_path / "recipe.yaml").adapters["home"].data
    with pytest.raises(UsageError, match=r"no row of .*home-train\.jsonl is left for .*, as all 20 rows have problems"):
        write_clean(found, data, clean)
    assert not clean.exists()


def test_composed_and_decomposed_letters_are_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": {"do": "on"}} for text in ("Öffne die Tür", "O\u0308ffne die Tu\u0308r")]
    assert places(checked(tmp_path, [*rows, *ORDERS]), "repeat") == [["train:1", "train:2"]]


def test_ids_of_calls_make_no_prompts_different(tmp_path: Path) -> None:
    def row(name: str) -> dict[str, Any]:
        call = {"id": name, "type": "function", "function": {"name": "dim", "arguments": {"level": 1}}}
        talk = [{"role": "user", "content": "dim"}, {"role": "assistant", "tool_calls": [call]}]
        talk += [{"role": "tool", "tool_call_id": name, "content": "done"}, {"role": "assistant", "content": "Done."}]
        return {"messages": talk, "tools": [TOOL]}

    rows = [row("123456789"), row("abcdefghi")]
    more = [{"prompt": f"dim {room}", "completion": "which lamp do you mean"} for room in ROOMS]
    assert places(checked(tmp_path, [*rows, *more]), "repeat") == [["train:1", "train:2"]]


@pytest.mark.parametrize("seconds", [20, 60, 600])
def test_a_training_and_its_validation_end_in_the_planned_time(seconds: float) -> None:
    rows = [Example((5,) * (5 + n % 8), (True,) * (5 + n % 8), 0) for n in range(96)]
    method, training = methods.load("lora"), TrainingSpec(epochs=30, batch_size=1)
    options = method.options()
    job = TrainingJob("home", method, options, training, rows, rows[:1], "", method.objective(options))
    shorter = folds._within(seconds, 100, job)
    # Four trainings share three quarters of the time, and the last step is rounded up.
    assert tokens_left(rows[24:], rows[:24], shorter) <= seconds * 100 * 0.75 / 4 + 12


def test_the_time_in_which_each_training_reads_its_rows_is_named() -> None:
    rows = [Example((5,) * (5 + n % 8), (True,) * (5 + n % 8), 0) for n in range(96)]
    method = methods.load("lora")
    options = method.options()
    job = TrainingJob("home", method, options, TrainingSpec(epochs=30), rows, rows[:1], "", method.objective(options))
    assert folds._within(folds._epoch_seconds(100, job), 100, job).epochs == pytest.approx(1)
    known = [JudgedRow("train:1", 0.1, 1), JudgedRow("train:2", 0.1, 0.01, "off", 0.1)]
    assert "2% of its rows, which is too little" in LabelEstimate(known, 0, 0.02, 60, needed_minutes=9).summary
    assert "--minutes 9" in LabelEstimate(known, 0, 0.02, 60, needed_minutes=9).summary
    assert "; judged 50% of the answers" in LabelEstimate(known, 2, 2.0, 60).summary


def test_an_estimate_says_what_it_found_and_how_well_its_adapters_know_the_task() -> None:
    known = [JudgedRow("train:1", 0.1, 1), JudgedRow("train:2", 0.1, 0.01, "off", 0.1)]
    counted = "1 of 2 answers are probably wrong; the adapters would give 1 themselves"
    assert LabelEstimate(known, 0, 2.0, 60).summary == counted
    hardly = LabelEstimate(known[1:], 0, 2.0, 60).summary
    assert "would give 0 themselves; they hardly know the task, so some may be missed" in hardly


def test_too_few_rows_to_find_wrong_answers_are_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), data={"rows.jsonl": ORDERS[:7]})
    with pytest.raises(UsageError, match="7 different prompts are too few"):
        check(Recipe.from_file(recipe), minutes=1, progress=QUIET)


@pytest.mark.parametrize(("method", "arch"), [("prefix", "llama"), ("full", "llama"), ("lora", "lfm2")])
def test_methods_without_modules_and_recurrent_bases_find_wrong_answers_too(
    method: str, arch: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{word} {thing}", "completion": word} for word in ("turn", "stop") for thing in ROOMS[:5]]
    adapters = {"home": adapter_of(method)}
    recipe = write_recipe(tmp_path, tiny_gguf(arch), adapters, data={"rows.jsonl": rows}, training={"max_steps": 2})
    (found,) = check(Recipe.from_file(recipe, {"adapters.home.data.check_minutes": "1"}), progress=QUIET)
    assert found.estimate is not None
    assert all(0 <= row.likelihood <= 1 and 0 <= row.relative <= 1 for row in found.estimate.rows)
    assert len(found.estimate.rows) == len(rows)


def test_of_a_conversation_each_call_is_judged_and_one_that_is_wrong_leaves_it_out(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    def row(room: str) -> dict[str, Any]:
        call = {"function": {"name": "light", "arguments": {"area": room}}}
        talk = [{"role": "user", "content": f"light the {room}"}, {"role": "assistant", "tool_calls": [call]}]
        talk += [{"role": "tool", "name": "light", "content": "ok"}, {"role": "assistant", "content": "Done."}]
        return {"messages": talk, "tools": [ROOM_TOOL]}

    data = {"rows.jsonl": [row(room) for room in ROOMS]}
    recipe = write_recipe(tmp_path, tiny_gguf("llama"), data=data, training={"max_steps": 2})
    (found,) = check(Recipe.from_file(recipe), minutes=1, progress=QUIET)
    assert found.estimate is not None
    places = [row.where for row in found.estimate.rows]
    source = places[0].partition("rows.jsonl")[0] + "rows.jsonl"
    assert sorted(places) == sorted(f"{source}:{line}, message 2" for line in range(1, len(ROOMS) + 1))
    doubtful = [replace(row, own="?", weight=0.5) for row in found.estimate.rows[:1]]
    found = replace(
        found, findings=[Finding("wrong_label", (doubtful[0].where,))], estimate=LabelEstimate(doubtful, 0, 1, 1)
    )
    spec, clean = Recipe.from_file(recipe).adapters["command"].data, tmp_path / "clean.jsonl"
    assert write_clean(found, spec, clean) == {"wrong_label": 1}
    assert len(read_rows(str(clean))) == len(ROOMS) - 1
    assert not write_clean(found, spec, clean, weighted=True)
    assert sorted(row.weight for row in read_rows(str(clean)))[:2] == [0.5, 1]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_are_judged_together_as_alone(
    architecture: str, tiny_base: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(architecture)
    with closing(GgufTokenizer(base.path)) as tokenizer:
        examples = examples_of(tokenizer)
        model = load_torch(base, torch.float32)
        together = judge(Reader(model, examples, takes_cache=True), tokenizer, ROWS, examples, Step("", len(ROWS)))
        monkeypatch.setattr(judging, "_LOGITS_PER_PASS", 1)
        whole = Reader(model, examples, takes_cache=False)
        for row, alone in zip(together, judge(whole, tokenizer, ROWS, examples, Step("", len(ROWS))), strict=True):
            assert row.where == alone.where
            assert row.relative == pytest.approx(alone.relative, rel=1e-3)
            assert row.own == alone.own


def test_versions_of_a_row_are_read_after_what_did_not_change(tiny_base: Callable[[str], Base]) -> None:
    base = tiny_base("llama")
    with closing(GgufTokenizer(base.path)) as tokenizer:
        examples = examples_of(tokenizer)
        model = load_torch(base, torch.float32)
        cached, whole = (Reader(model, examples, takes_cache=cache).continued() for cache in (True, False))
        tokens = list(examples[0].tokens)
        for first, version in ((len(tokens) - 4, tokens), (len(tokens) - 2, [*tokens[:-1], 65, 66])):
            torch.testing.assert_close(
                cached.logits(version, first), whole.logits(version, first), rtol=1e-3, atol=1e-4
            )


def test_rows_that_the_time_leaves_are_not_judged(
    tiny_base: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama")
    monkeypatch.setattr(judging, "_LOGITS_PER_PASS", 1)
    with closing(GgufTokenizer(base.path)) as tokenizer:
        examples = examples_of(tokenizer)
        reader = Reader(load_torch(base, torch.float32), examples, takes_cache=True)
        judged = judge(reader, tokenizer, ROWS, examples, Step("", len(ROWS)), deadline=time.monotonic())
    assert [row.where for row in judged] == ["x:1"]


def examples_of(tokenizer: GgufTokenizer) -> list[Example]:
    return tokenize_rows(ROWS, tokenizer, system="Be brief.", loss_on="completion", max_tokens=512)[0]


def test_rows_are_too_long_for_what_the_base_was_trained_for(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    data = {"rows.jsonl": [*ORDERS, {**ORDERS[0], "prompt": "lamp " * 600}]}
    options: tuple[tuple[dict[str, Any], int], ...] = (({}, 512), ({"context_length": 256}, 256))
    for option, longest in options:
        recipe = write_recipe(tmp_path, tiny_gguf("llama"), data=data, **option)
        (found,) = check(Recipe.from_file(recipe), progress=QUIET)
        (long,) = [each for each in found.findings if each.kind == TOO_LONG]
        assert found.context_length == longest and long.note.endswith(f"and the context has {longest}")
