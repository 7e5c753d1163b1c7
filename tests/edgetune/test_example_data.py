"""The rows of examples/smart-home: they parse, measure what was not trained, keep to their labels, calls and manner."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest

from edgetune.recipe.model import Recipe
from edgetune.tasks.data import TaskRow, read_rows

EXAMPLE = Path(__file__).parents[2] / "examples" / "smart-home"
SIZES = {"command": (600, 100, 100), "intent": (600, 100, 100), "reply": (400, 60, 60)}
SPLITS = ("train", "validation", "test")
PARAMETERS = {
    "light.turn_on": {"area"}, "light.turn_off": {"area"}, "light.set_brightness": {"area", "brightness"},
    "light.set_color": {"area", "color"}, "climate.set_temperature": {"area", "temperature"}, "cover.open": {"area"},
    "cover.close": {"area"}, "cover.set_position": {"area", "position"}, "media.play": {"area"},
    "media.pause": {"area"}, "media.set_volume": {"area", "volume"}, "lock.lock": {"door"}, "lock.unlock": {"door"},
    "timer.start": {"minutes"}, "vacuum.start": {"area"}, "vacuum.dock": set(), "fan.turn_on": {"area"},
    "fan.turn_off": {"area"},
}  # fmt: skip
NUMBERS = {
    "brightness": (0, 100),
    "position": (0, 100),
    "volume": (0, 100),
    "temperature": (10, 30),
    "minutes": (1, 120),
}
RECIPE = Recipe.from_file(EXAMPLE / "recipe.yaml")


def rows(task: str, split: str) -> list[TaskRow]:
    return read_rows(str(EXAMPLE / "data" / f"{task}-{split}.jsonl"), None, labels=RECIPE.adapters[task].labels)


def prompt(row: TaskRow) -> str:
    assert row.messages is not None
    return row.messages[-1]["content"]


def completion(row: TaskRow) -> str:
    assert row.completion is not None
    return row.completion


def all_rows(task: str) -> list[TaskRow]:
    return [row for split in SPLITS for row in rows(task, split)]


def calls(split: str) -> list[dict[str, str | int]]:
    return [json.loads(completion(row)) for row in rows("command", split)]


@pytest.mark.parametrize("task", SIZES)
def test_each_split_has_its_number_of_rows(task: str) -> None:
    assert tuple(len(rows(task, split)) for split in SPLITS) == SIZES[task]


@pytest.mark.parametrize("task", SIZES)
def test_the_recipe_trains_and_validates_on_these_files(task: str) -> None:
    data = RECIPE.adapters[task].data

    assert [Path(data.train).name, Path(data.validation or "").name] == [
        f"{task}-train.jsonl",
        f"{task}-validation.jsonl",
    ]


@pytest.mark.parametrize("task", SIZES)
def test_no_prompt_occurs_twice_in_any_spelling_of_case_and_punctuation(task: str) -> None:
    spoken = Counter(" ".join(re.findall(r"\w+", prompt(row).lower())) for row in all_rows(task))

    assert [text for text, count in spoken.items() if count > 1] == []


def test_every_command_is_a_call_with_just_the_parameters_of_its_service() -> None:
    for call in (call for split in SPLITS for call in calls(split)):
        assert call.keys() == {"service"} | PARAMETERS[str(call["service"])]
        for name, (low, high) in NUMBERS.items():
            value = call.get(name, low)
            assert isinstance(value, int)
            assert low <= value <= high


def test_every_service_is_trained_and_measured() -> None:
    for split in SPLITS:
        assert {call["service"] for call in calls(split)} == PARAMETERS.keys()


def test_every_area_and_door_that_is_measured_is_trained() -> None:
    trained = {place for call in calls("train") if (place := call.get("area", call.get("door")))}
    measured = {place for split in SPLITS[1:] for call in calls(split) if (place := call.get("area", call.get("door")))}

    assert measured <= trained
    assert len(trained) >= 15


def test_every_label_is_trained_and_measured() -> None:
    for split in SPLITS:
        counts = Counter(completion(row) for row in rows("intent", split))
        assert counts.keys() == set(RECIPE.adapters["intent"].labels or ())
        assert min(counts.values()) * 3 > max(counts.values())


def test_no_intent_is_told_by_one_word_alone() -> None:
    labels_of: dict[str, set[str]] = {}
    for row in rows("intent", "train"):
        for word in re.findall(r"\w+", prompt(row).lower()):
            labels_of.setdefault(word, set()).add(completion(row))

    for word in ("light", "lights", "door", "music", "vacuum", "weather", "list"):
        assert len(labels_of[word]) >= 2, word


def test_every_reply_keeps_to_the_butlers_manner() -> None:
    for row in all_rows("reply"):
        reply = completion(row)
        assert re.fullmatch(r"(Certainly|With regret|If I may), [^.!?\n]+\.", reply), reply
        assert len(reply.split()) <= 16, reply
        assert reply.startswith("With regret") == prompt(row).startswith("failed")


def test_the_generator_writes_the_same_files_again(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "data" / "source", tmp_path / "source")
    shutil.copy(EXAMPLE / "data" / "generate.py", tmp_path)

    runpy.run_path(str(tmp_path / "generate.py"), run_name="__main__")

    for task in SIZES:
        for split in SPLITS:
            name = f"{task}-{split}.jsonl"
            assert (tmp_path / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes()


def test_no_held_back_pair_of_service_and_area_is_trained() -> None:
    held_back = runpy.run_path(str(EXAMPLE / "data" / "generate.py"))["HELD_BACK"]

    assert held_back.isdisjoint((call["service"], call.get("area")) for call in calls("train"))
