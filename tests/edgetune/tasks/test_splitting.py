"""Rows that stay together in splits, halves and folds, and the conversations that answers are of."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from edgetune_runtime.errors import UsageError
from recipes import thermometers

from edgetune.recipe.rows import Rows
from edgetune.tasks.data import TaskRow, place_of_row, read_rows
from edgetune.tasks.metrics import answers_to_score
from edgetune.tasks.plain_prompts import plain_prompt
from edgetune.tasks.splitting import conversations, folds_of, halves, split


def row(prompt: str, completion: str = "ok", where: str = "rows.jsonl:1") -> TaskRow:
    return TaskRow(where, ({"role": "user", "content": prompt},), completion)


def conversation(turns: list[tuple[str, str]], where: str = "x") -> TaskRow:
    *earlier, (prompt, answer) = turns
    before = [
        {"role": role, "content": text}
        for turn in earlier
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return TaskRow(where, (*before, {"role": "user", "content": prompt}), answer)


def test_the_split_is_the_same_for_the_same_seed_and_loses_no_row() -> None:
    rows = [row(f"prompt {n}", where=str(n)) for n in range(50)]
    train, validation = split(rows, 0.1, seed=3, metric="exact")
    assert (train, validation) == split(rows, 0.1, seed=3, metric="exact")
    assert (train, validation) != split(rows, 0.1, seed=4, metric="exact")
    assert len(validation) == 5
    assert sorted(int(r.where) for r in [*train, *validation]) == list(range(50))
    assert [int(r.where) for r in train] == sorted(int(r.where) for r in train)


@pytest.mark.parametrize("seed", range(5))
def test_rows_with_the_same_prompt_but_for_case_and_punctuation_stay_on_one_side(seed: int) -> None:
    rows = [row(f"{('prompt', 'Prompt')[n % 2]} {n % 7}{'.' * (n % 3)}", f"answer {n}") for n in range(40)]
    train, validation = split(rows, 0.2, seed, "exact")
    assert validation
    assert not {plain_prompt(r) for r in train} & {plain_prompt(r) for r in validation}


@pytest.mark.parametrize("seed", range(5))
def test_few_rows_that_differ_in_the_system_prompt_alone_stay_on_one_side(seed: int) -> None:
    def told(n: int, prompt: str) -> TaskRow:
        said = ({"role": "system", "content": f"It is {n} May."}, {"role": "user", "content": prompt})
        return TaskRow(f"rows.jsonl:{n}", said, "ok")

    rows = [told(n, f"ask {n // 2}") for n in range(40)]
    train, validation = split(rows, 0.2, seed, "exact")
    assert len(validation) == 8 and len({r.prompt for r in validation} - {r.prompt for r in train}) == 4
    assert sum(len({r.prompt for r in fold}) for fold in folds_of(rows, 4, seed, "exact")) == 20
    # Where all rows ask the same, the system prompt is what they ask about.
    assert len(split([told(n, "what is it") for n in range(40)], 0.2, seed, "exact")[1]) == 8


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_begin_the_same_conversation_stay_on_one_side(seed: int) -> None:
    # Two rows of each, one with a turn more. All begin with the same greeting, which is no row.
    said = [[("hi", "hello"), (f"do {n}", f"did {n}"), (f"undo {n}", f"undid {n}")] for n in range(20)]
    rows = [conversation(turns[:length], where=str(n)) for n, turns in enumerate(said) for length in (2, 3)]
    random.Random(seed).shuffle(rows)
    train, validation = split(rows, 0.2, seed, "exact")
    assert len(validation) == 8
    assert not {r.where for r in train} & {r.where for r in validation}


@pytest.mark.parametrize("seed", range(5))
def test_conversations_with_the_same_call_stay_on_one_side_whatever_its_result(seed: int) -> None:
    rows = read_rows(Rows.of("x", thermometers(60, rooms=20)))
    parts = [*split(rows, 0.2, seed, "json")], folds_of(rows, 4, seed, "json"), halves(rows, seed, "json")
    for one, *others in parts:
        assert {r.turns[0]["content"].lower() for r in one}.isdisjoint(
            r.turns[0]["content"].lower() for other in others for r in other
        )
        assert len(one) >= 12


def test_rows_that_begin_a_conversation_are_of_it() -> None:
    said = [("hi", "hello"), ("do it", "did it"), ("undo it", "undid it")]
    rows = [conversation(said[:length], where=f"x:{length}") for length in (2, 3)]
    other = conversation([said[0], ("stop", "stopped")], where="x:4")
    assert conversations([*rows[0].answers, *rows[1].answers, other]) == ["x:2", "x:2", "x:2", "x:2", "x:2", "x:4"]
    assert place_of_row("my, message box.jsonl:2, message 4") == "my, message box.jsonl:2"
    # Several go on with a greeting, each in its own way.
    greeting = conversation(said[:1], where="x:1")
    assert conversations([greeting, *rows, other]) == ["x:1", "x:2", "x:2", "x:4"]


def test_rows_per_turn_of_calls_and_results_are_of_one_conversation() -> None:
    first, second = thermometers(2, 2)
    longer = {**first, "messages": [*first["messages"], *second["messages"]]}
    rows = read_rows(Rows.of("x", [first, longer, *thermometers(1, 2, first=4)]))
    places = [row.where for row in rows]
    assert conversations(answers_to_score(rows, "json")) == [places[0], places[0], places[2]]


def test_conversations_with_the_same_first_call_are_in_one_fold_where_they_are_few() -> None:
    rows = thermometers(160, 80)
    for row in rows:
        # The result of the first call is in the prompt of the last one.
        row["messages"][3:3] = row["messages"][1:3]
    read = read_rows(Rows.of("x", rows))
    for fold in folds_of(read, 4, 0, "json"):
        others = [row for row in read if row not in fold]
        assert len(fold) == 40 and not {r.turns[0]["content"].lower() for r in fold} & {
            r.turns[0]["content"].lower() for r in others
        }
    # Where many rows have a call, all of them together would be all that a score is about.
    many = read_rows(
        Rows.of(
            "x",
            [{**row, "messages": [*rows[n % 10]["messages"][:2], *row["messages"][2:]]} for n, row in enumerate(rows)],
        )
    )
    assert len({row.turns[0]["content"] for row in split(many, 0.1, 0, "json")[1]}) > 5
    same = read_rows(Rows.of("x", thermometers(3, 1)))
    with pytest.raises(UsageError, match="3 rows with the same prompt cannot be split"):
        split(same, 0.2, 0, "json")


@pytest.mark.parametrize("seed", range(5))
def test_each_answer_is_in_both_halves_where_prompts_repeat(seed: int) -> None:
    rng = random.Random(seed)
    rows = [row(f"ask {rng.randrange(140)}", where=str(n)) for n in range(200)]
    rows = [replace(each, completion=f"label {int(each.prompt.split()[1]) % 10}") for each in rows]
    one, other = (Counter(each.completion for each in half) for half in halves(rows, seed, "label"))
    assert all(abs(one[label] - other[label]) <= 3 for label in one | other)


def test_rows_that_all_begin_with_one_are_halved_all_the_same() -> None:
    rows = [conversation([("hi", "hello"), (f"do {n}", f"did {n}")][: 2 if n else 1]) for n in range(61)]
    assert sorted(map(len, halves(rows, 0, "exact"))) == [30, 31]


@pytest.mark.parametrize("held_out", [0.01, 0.99])
def test_each_side_gets_a_row_at_least(held_out: float) -> None:
    train, validation = split([row("a"), row("b")], held_out, seed=0, metric="exact")
    assert (len(train), len(validation)) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([row("a")], "only 1 row"),
        ([row("a", "b"), row("a", "c")], "2 rows with the same prompt"),
        ([row("a", "b"), conversation([("a", "b"), ("c", "d")])], "2 rows of one conversation"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(rows: list[TaskRow], problem: str) -> None:
    with pytest.raises(UsageError, match=f"^{problem} cannot be split"):
        split(rows, 0.5, seed=0, metric="exact")
