from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.answer_log.answers import LoggedAnswer
from edgetune_runtime.errors import UsageError
from recipes import make_recipe

from edgetune.recipe.model import Recipe
from edgetune.retraining.learning.learn import _spec, _spec_to_compare
from edgetune.retraining.learning.rows import TooFewCorrectionsError, compared_rows, doubts, learned_rows
from edgetune.tasks.data import TaskRow
from edgetune.tasks.task import Task, read_task

ROOMS = ("hall", "attic", "study", "den", "loft", "cellar")
ORDERS = [
    {"prompt": f"turn {state} the lamp in the {room}", "completion": {"do": state, "area": room}}
    for room in ROOMS
    for state in ("on", "off")
]
SCHEMA = {
    "type": "object",
    "properties": {"do": {"enum": ["on", "off"]}, "area": {"type": "string"}},
    "required": ["do", "area"],
    "additionalProperties": False,
}


def task_of(folder: Path, **keys: Any) -> Task:  # noqa: ANN401 - keys of an adapter
    """A task whose two validation rows and two rows for the confidence are the last orders."""
    files = {"rows.jsonl": ORDERS[:8], "more.jsonl": ORDERS[8:10], "sure.jsonl": ORDERS[10:]}
    data = {"train": "rows.jsonl", "validation": "more.jsonl", "confidence": "sure.jsonl"}
    return read_task("home", make_recipe(folder, "missing.gguf", {"home": {"data": data, **keys}}, data=files))


def corrected(*pairs: tuple[str, str]) -> list[LoggedAnswer]:
    return [
        LoggedAnswer(f"a{number}", "", "home", "", "home", ({"role": "user", "content": prompt},), "?", None, answer)
        for number, (prompt, answer) in enumerate(pairs)
    ]


FINE = [(f"lamp {n} in the hall", '{"do": "on", "area": "hall"}') for n in range(4)]


def test_what_is_doubtful_about_corrections_is_said(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    assert list(doubts(task, learned_rows(task, corrected(*FINE)))) == []
    odd = [
        ("brighten the den", '{"do": "on", "aera": "den"}'),
        ("Turn on the lamp in the hall!", '{"do": "off", "area": "hall"}'),
    ]
    rows = learned_rows(task, corrected(*FINE, *odd))
    spelled, contradicted = doubts(task, rows)
    assert spelled.startswith("log:a4: has the field aera, which no other answer has; area is meant?: 'brighten")
    assert "log:a5: 2 different answers: 'turn on the lamp in the hall' → " in contradicted


def test_corrections_are_compared_with_the_old_rows_alone(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    many = [replace(row, where=f"{row.where}/{n}") for n in range(2) for row in task.train]
    odd = [(f"dye the {room}", f'{{"do": "blue", "area": "{room}"}}') for room in ("hall", "den")]
    odd += [("turn it off", '{"do": "off"}')]
    said = [*doubts(task, learned_rows(replace(task, train=many), corrected(*FINE, *odd)))]
    assert sorted(text.partition(": '")[0] for text in said) == [
        f"log:a{n}: has a form or a value that no training row has" for n in (4, 5, 6)
    ]


def test_corrections_of_rows_that_are_kept_apart_are_left_out_and_counted(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    apart = [(f"{ORDERS[place]['prompt']}!", '{"do": "on", "area": "den"}') for place in (8, 10)]
    rows = learned_rows(task, corrected(*FINE, *apart))
    assert (rows.learned, len(rows.held_out), rows.left_out) == (3, 1, 2)
    (said,) = doubts(task, rows)
    assert said == "left out 2 corrections of prompts for validation or the confidence: correct those rows"
    told = "has 5 new corrected answers .*; 2 have prompts for validation or the confidence, which leaves 3, fewer"
    with pytest.raises(TooFewCorrectionsError, match=told):
        learned_rows(task, corrected(*FINE[:3], *apart))


def test_earlier_answers_of_conversations_are_kept_apart_too(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    asked, more = ({"role": "user", "content": text} for text in ("dim the den", "more"))
    answer = {"role": "assistant", "content": '{"do": "on", "area": "den"}'}
    talk = replace(task.validation[0], messages=(asked, answer, more))
    again = ("Dim the den!", '{"do": "off", "area": "den"}')
    rows = learned_rows(replace(task, validation=[talk]), corrected(*FINE, again))
    assert (rows.learned, rows.left_out) == (3, 1)


def test_no_correction_is_held_out_whose_prompt_is_learned_in_another_case(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    old = [(f"{row['prompt']}!", '{"do": "on", "area": "cellar"}') for row in ORDERS[:8]]
    loud = [(f"{prompt.upper()}!", answer) for prompt, answer in FINE]
    rows = learned_rows(task, corrected(*old, *FINE, *loud))
    assert sorted(row.prompt for row in rows.held_out) == ["LAMP 0 IN THE HALL!", "lamp 0 in the hall"]
    assert rows.learned == 14


def test_corrections_of_one_sentence_are_too_few_however_often_it_was_said(tmp_path: Path) -> None:
    task, answer = task_of(tmp_path), FINE[0][1]
    told = "has 4 new corrected answers of adapter 'home'; apart from case, .* that leaves 2, fewer"
    with pytest.raises(TooFewCorrectionsError, match=told):
        learned_rows(task, corrected(*[(text, answer) for text in ("Light it", "light it", "light it!", "dim it")]))
    days = [
        replace(entry, messages=({"role": "system", "content": f"Today is day {number}."}, *entry.messages))
        for number, entry in enumerate(corrected(*[FINE[0]] * 6))
    ]
    with pytest.raises(TooFewCorrectionsError, match=r"has 6 new .* that leaves 1, fewer than 4"):
        learned_rows(task, days)
    rows = learned_rows(task, [*days, *(replace(entry, id=f"b{entry.id}") for entry in corrected(*FINE[1:]))])
    assert (rows.learned, len(rows.held_out)) == (3, 6)


def test_no_copy_has_the_prompt_of_a_correction_that_is_held_out(tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "validation": "more.jsonl", "augment": {"copies": 9, "noise": 0}}
    task = task_of(tmp_path, data=data)
    rows = learned_rows(task, corrected(("lamp 1 in the attic", '{"do": "on", "area": "attic"}'), *FINE))
    recipe = Recipe.from_file(tmp_path / "recipe.yaml")
    found = [
        {copy.row.prompt for copy in read_task("home", recipe.model_copy(update={"adapters": {"home": spec}})).copies}
        for spec in (_spec(task, rows.train, rows.validation), _spec_to_compare(task, rows))
    ]
    told = [prompts & {row.prompt for row in rows.held_out} for prompts in found]
    assert told == [{"lamp 1 in the attic"}, set()] and found[1]


def test_of_several_corrections_of_a_prompt_the_last_counts(tmp_path: Path) -> None:
    task, on, off = task_of(tmp_path), *(f'{{"do": "{state}", "area": "den"}}' for state in ("on", "off"))
    rows = learned_rows(task, corrected(*FINE, ("dim it", on), ("dim it", off), ("dim me", on), ("dim me", on)))
    assert [row.completion for row in (*rows.train, *rows.held_out) if row.prompt == "dim it"] == [off]
    assert [*doubts(task, rows)] == ["corrected in several ways, of which the last counts: 'dim it'"]


def test_corrections_that_were_learned_before_are_learned_no_second_time(tmp_path: Path) -> None:
    first = learned_rows(task_of(tmp_path), corrected(*FINE))
    task = replace(task_of(tmp_path), train=first.train, validation=[*first.validation, *first.held_out])
    more = [(f"lamp {n} in the den", '{"do": "on", "area": "den"}') for n in range(4)]
    second = learned_rows(task, corrected(*FINE, *more))
    assert (second.learned, len(second.held_out), second.left_out) == (3, 1, 0)
    assert {row.prompt for row in first.train} < {row.prompt for row in second.train}
    with pytest.raises(TooFewCorrectionsError, match="has 0 new corrected answers of adapter 'home', fewer than 4"):
        learned_rows(task, corrected(*FINE))
    other = replace(first.train[-1], completion='{"do": "off", "area": "hall"}')
    settled = learned_rows(replace(task, train=[*task.train, other]), corrected(*FINE, *more))
    assert other not in settled.train


@pytest.mark.parametrize("text", ["5", "null", '"hall"'])
def test_other_json_than_all_answers_have_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the correction .* is no JSON object or list, as all other answers are"):
        learned_rows(task_of(tmp_path), corrected(*FINE, ("brighten the den", text)))


def test_a_correction_that_would_end_the_choices_of_all_answers_is_doubtful(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{number} lamps {state}", "completion": state} for number in range(12) for state in ("on", "off")
    ]
    adapter = {"data": {"train": "rows.jsonl", "held_out": 0.1}, "output": "auto", "metric": "exact"}
    task = read_task("home", make_recipe(tmp_path, "missing.gguf", {"home": adapter}, data={"rows.jsonl": rows}))
    right = [(f"lamp {number} please", "on") for number in range(4)]
    assert list(doubts(task, learned_rows(task, corrected(*right)))) == []
    (doubt,) = doubts(task, learned_rows(task, corrected(*right, ("no lamp", "Off."))))
    assert doubt == "log:a4: 'Off.' is no answer of another row, so all answers become free text"


def test_the_users_own_rows_out_of_scope_stay(tmp_path: Path) -> None:
    rows = [{"text": f"make it {color} {n}", "label": color} for n in range(8) for color in ("red", "warm")]
    rows += [{"text": f"sing a song {n}", "label": "out_of_scope"} for n in range(6)]
    adapter = {"data": {"train": "rows.jsonl", "held_out": 0.1}, "out_of_scope": True}
    recipe = make_recipe(tmp_path, "missing.gguf", {"home": adapter}, data={"rows.jsonl": rows})
    task = read_task("home", recipe)
    learned = learned_rows(task, corrected(*[(f"what is {n} by two", "out_of_scope") for n in range(4)]))
    own = [row for row in (*learned.train, *learned.validation) if row.prompt.startswith("sing")]
    assert len(own) == 6
    made = [row for row in (*task.train, *task.validation) if row.where.startswith("made:")]
    assert made and not {row.prompt for row in made} & {row.prompt for row in (*learned.train, *learned.validation)}
    assert [row.where for row in learned.made] == [row.where for row in task.validation if row in made]
    again = replace(task, train=[*learned.train, *made], validation=[*learned.validation, *learned.held_out])
    more = corrected(*[(f"and {n} by three", "out_of_scope") for n in range(4)])
    assert {row.prompt for row in learned_rows(again, more).train} > {row.prompt for row in learned.train}


def test_adapters_are_not_compared_on_made_rows_that_the_new_one_is_trained_on(tmp_path: Path) -> None:
    rows = [{"text": f"make it {color} {n}", "label": color} for n in range(40) for color in ("red", "warm")]
    orders = [{"prompt": f"{number} cups of tea", "completion": f"tea {number}"} for number in range(40)]
    adapters = {
        "home": {"data": {"train": "rows.jsonl", "held_out": 0.1}, "out_of_scope": True},
        "shop": {"data": {"train": "orders.jsonl"}},
    }
    files = {"rows.jsonl": rows, "orders.jsonl": orders}
    recipe = make_recipe(tmp_path, "missing.gguf", adapters, data=files)
    task = read_task("home", recipe)
    split = learned_rows(task, corrected(*[(f"what is {n} by two", "out_of_scope") for n in range(4)]))
    assert compared_rows(task, split, recipe) == [*split.validation, *split.made]
    # Another number of orders, as after corrections of this adapter too.
    files["orders.jsonl"] = orders[::-1][:33]
    again = make_recipe(tmp_path, "missing.gguf", adapters, data=files)
    trained = {row.prompt for row in read_task("home", again).train}
    kept = compared_rows(task, split, again)
    assert {row.prompt for row in split.made} & trained
    assert kept == [row for row in (*split.validation, *split.made) if row.prompt not in trained]


def test_a_correction_takes_its_place_in_conversations_too(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    asked, more = {"role": "user", "content": FINE[0][0]}, {"role": "user", "content": "and now off"}
    old = {"role": "assistant", "content": '{"do": "off", "area": "hall"}'}
    talk = TaskRow("x:1", (asked, old, more), '{"do": "off", "area": "hall"}')
    rows = learned_rows(replace(task, train=[*task.train, talk]), corrected(*FINE))
    assert FINE[0][0] not in {row.prompt for row in rows.held_out}
    (taught,) = [row for row in rows.train if row.where == "x:1"]
    assert taught.turns == (asked, {**old, "content": FINE[0][1]}, more, talk.turns[-1])


@pytest.mark.parametrize("is_after_the_right_one", [True, False])
def test_a_correction_after_a_corrected_answer_takes_the_place_of_the_old_one(
    is_after_the_right_one: bool, tmp_path: Path
) -> None:
    task = task_of(tmp_path)
    asked, off, more = ({"role": "user", "content": text} for text in ("light it", "and now off", "and the den"))
    old, new, den = (
        f'{{"do": "{do}", "area": "{area}"}}' for do, area in (("on", "hall"), ("on", "loft"), ("off", "den"))
    )
    said, right = ({"role": "assistant", "content": text} for text in (old, new))
    short, long = TaskRow("x:1", (asked, said, off), old), TaskRow("x:2", (asked, said, off, said, more), den)
    first, second = corrected(("light it", new), ("and now off", den))
    second = replace(second, id="b1", messages=(asked, right if is_after_the_right_one else said, off))
    entries = [second, replace(first, id="b0"), *corrected(*FINE)]
    rows = learned_rows(replace(task, train=[*task.train, short]), entries)
    assert "x:1" not in {row.where for row in rows.train}
    rows = learned_rows(replace(task, train=[*task.train, long]), entries)
    (taught,) = [row for row in rows.train if row.where == "x:2"]
    assert [turn["content"] for turn in taught.turns[1::2]] == [new, den, den]
    assert "log:b0" not in {row.where for row in rows.held_out}


def test_a_correction_of_an_answer_that_was_not_learned_is_not_learned_in_its_conversation(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    asked, more = {"role": "user", "content": FINE[0][0]}, {"role": "user", "content": "and now off"}
    old = {"role": "assistant", "content": '{"do": "off", "area": "hall"}', "weight": 0}
    talk = TaskRow("x:1", (asked, old, more), '{"do": "off", "area": "hall"}')
    rows = learned_rows(replace(task, train=[*task.train, talk]), corrected(*FINE))
    (taught,) = [row for row in rows.train if row.where == "x:1"]
    assert [answer.prompt for answer in taught.answers] == ["and now off"]


def test_a_correction_that_breaks_the_output_is_named_by_its_answer(tmp_path: Path) -> None:
    task = task_of(tmp_path, output={"schema": SCHEMA})
    bad = ("dim the den", '{"do": "dim", "area": "den"}')
    with pytest.raises(
        UsageError, match=r"answer a4 to 'dim the den': the correction '.*dim.*' breaks the schema of the recipe"
    ):
        learned_rows(task, corrected(*FINE, bad))
    schema = {**SCHEMA, "properties": {**SCHEMA["properties"], "area": {"type": "string", "x-from-prompt": True}}}
    with pytest.raises(
        UsageError, match=r"the correction '.*hall.*' has a text that its prompt lacks, where x-from-prompt"
    ):
        learned_rows(task_of(tmp_path, output={"schema": schema}), corrected(*FINE, ("turn it on", FINE[0][1])))
    with pytest.raises(UsageError, match="the correction 'lamp on' is not an answer that the metric json can score"):
        learned_rows(task_of(tmp_path), corrected(*FINE, ("dim the den", "lamp on")))


def test_corrections_under_another_system_prompt_are_kept_apart_or_doubted(tmp_path: Path) -> None:
    task, day = task_of(tmp_path), {"role": "system", "content": "Today is day 99."}
    wrong = '{"do": "on", "area": "den"}'
    said = [(ORDERS[place]["prompt"], wrong) for place in (0, 8, 10)]
    entries = [replace(entry, messages=(day, *entry.messages)) for entry in corrected(*FINE, *said)]
    rows = learned_rows(task, entries)
    assert (rows.learned, len(rows.held_out), rows.left_out) == (4, 1, 2)
    assert ORDERS[0]["prompt"] in {row.prompt for row in rows.train if row.system}
    left_out, contradicted = doubts(task, rows)
    assert left_out.startswith("left out 2 corrections of prompts for validation or the confidence")
    assert "log:a4: 2 different answers: 'turn on the lamp in the hall' → " in contradicted
