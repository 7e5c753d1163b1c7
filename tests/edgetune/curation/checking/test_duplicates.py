"""Prompts that are nearly the same: which ones are, in which splits, and how long it takes to find them."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from recipes import thermometers

from edgetune.curation.checking.duplicates import NEAR, answer_key, duplicates, near
from edgetune.curation.checking.findings import SHARED, TEST, TRAIN, VALIDATION, SplitRow
from edgetune.recipe.parts import Metric
from edgetune.tasks.data import rows_of

WORDS = ("hall", "attic", "study", "den", "loft", "cellar", "porch", "pantry", "garage", "nursery")


def rows(split: str, *values: dict[str, Any]) -> list[SplitRow]:
    return [SplitRow(split, row) for row in rows_of(split, [(f"{split}:{n}", each) for n, each in enumerate(values)])]


def labelled(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "label": "light"} for text in texts]


def asked(text: str, system: str) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return {"messages": [*turns, {"role": "assistant", "content": "done"}]}


def found(*items: SplitRow, metric: Metric = "exact") -> list[tuple[str, tuple[str, ...]]]:
    return [(each.kind, each.where) for each in duplicates(items, metric, has_one_answer=True)]


def test_a_call_of_a_conversation_for_a_test_may_be_learned_with_another_result() -> None:
    talks = (
        rows(TRAIN, *thermometers(3, 3)),
        rows(TEST, *thermometers(2, 2, first=10)),
        rows(TEST, *thermometers(2, 9, 5)),
    )
    items = [item for part in talks for item in part]
    # The training row is left out of clean rows, as this call is what is scored of it.
    shared = (f"{TRAIN}:0", f"{TEST}:0, message 2")
    assert [each for each in found(*items, metric="json") if each[0] == SHARED] == [
        (SHARED, shared),
        (SHARED, tuple(at.replace("0", "1") for at in shared)),
    ]
    # A prompt is named once, whether it is that of a whole row too or not.
    (call,) = rows(TEST, {**thermometers(1, 1)[0], "messages": thermometers(1, 1)[0]["messages"][:2]})
    call = replace(call, row=replace(call.row, where="call"))
    assert sum(each[0] == SHARED for each in found(*items, call, metric="json")) == 2
    # A build scores of its own rows for validation what it has not learned, such as the text after the result.
    held_out = [replace(item, split=VALIDATION) if item.split == TEST else item for item in items]
    assert not [each for each in found(*held_out) if each[0] == SHARED]
    assert len([each for each in found(*held_out, metric="json") if each[0] == SHARED]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_each_text_near_an_earlier_one_is_found(seed: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 6))) for _ in range(60)]
    texts += [text[:place] + rng.choice("abc") + text[place:] for text in texts for place in [rng.randrange(len(text))]]
    grams = [{text[i : i + 3] for i in range(len(text) - 2)} for text in texts]
    expected = {
        place: earlier[0]
        for place, own in enumerate(grams)
        if (earlier := [n for n in range(place) if len(own & grams[n]) / len(own | grams[n]) >= NEAR])
    }
    assert {place: first for first, place in near(texts)} == expected


def test_long_texts_are_compared_by_their_words() -> None:
    words = [f"word{n}" for n in range(100)]
    texts = [" ".join(each) for each in (words, [*words[:90], *WORDS], [*words[:60], *WORDS], words[:46], words[:50])]
    assert list(near(texts)) == [(0, 1), (3, 4)]
    assert list(near(["", "\ud83d", "ab", "ab"])) == [(2, 3)]


def test_thousands_of_texts_take_seconds() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, range(2000, 0, -1), k=k)) for k in (100, 8) for _ in range(1000)]
    began = time.process_time()
    assert list(near([*texts, texts[0]])) == [(0, 2000)]
    assert time.process_time() - began < 15


def test_a_test_row_near_any_training_row_is_found() -> None:
    first, last = "turn off the lamp in the hall right now ok thanks", "please turn off the lamp in the hall right now"
    assert found(*rows(TRAIN, *labelled(first, f"please {first}")), *rows(TEST, *labelled(last))) == [
        ("near_repeat", ("train:0", "train:1")),
        ("near_shared", ("train:1", "test:0")),
    ]


def test_a_long_system_prompt_makes_no_prompts_alike_or_different() -> None:
    lights = "You control " + ", ".join(f"the light {room}" for room in WORDS)
    assert not found(
        *rows(TRAIN, *(asked(text, lights) for text in ("good night", "I am leaving now"))),
        *rows(TEST, asked("switch everything off please", lights)),
    )
    alike = ("switch everything off please", "switch everything off, please do")
    assert found(*rows(TRAIN, asked(alike[0], lights)), *rows(TEST, asked(alike[1], lights))) == [
        ("near_shared", ("train:0", "test:0"))
    ]
    assert not found(*rows(TRAIN, asked(alike[0], lights)), *rows(TEST, asked(alike[1], "You control no light.")))


def test_another_date_in_the_system_prompt_makes_no_prompts_different() -> None:
    days = [asked("switch everything off please", f"Today is 2024-{date}.") for date in ("01-07", "01-28", "11-03")]
    assert found(*rows(TRAIN, *days[:2]), *rows(TEST, days[2])) == [("near_shared", ("train:0", "train:1", "test:0"))]


def test_few_prompts_that_other_splits_have_under_another_system_prompt_are_found() -> None:
    held_out = [asked(text, "You are at home.") for text in ("good night", "lights off", "who is there")]
    trained = [asked("Good night!", "You are in a car."), asked("stop", "You are in a car.")]
    assert found(*rows(TRAIN, *trained), *rows(VALIDATION, *held_out)) == [("near_shared", ("train:0", "validation:0"))]
    # Where more rows ask the same than are held out, the system prompt is what they ask about.
    states = [asked("good night", f"The room is {word}.") for word in WORDS]
    assert not found(*rows(TRAIN, *states), *rows(VALIDATION, *held_out))


def test_numbers_of_answers_are_compared_by_their_values() -> None:
    assert answer_key('{"a": 25.0, "b": 1}') == answer_key('{"b": 1.0, "a": 25}') != answer_key('{"a": 25.5, "b": 1}')
