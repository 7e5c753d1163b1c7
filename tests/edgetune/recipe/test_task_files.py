from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, values_of

from edgetune.recipe.json_schema import json_schema
from edgetune.recipe.model import Recipe
from edgetune.recipe.saved import save_recipe

TASKS: dict[str, Any] = {"from": "tasks/*.yaml"}
NO_MATCH = "recipe.yaml:13: adapters.from: no file matches '{}'; patterns are relative to the recipe"
LORA = {"name": "lora", "r": 2}


def write(folder: Path, files: Mapping[str, object], adapters: Mapping[str, Any] | None = None) -> Path:
    """Write a recipe, and files with one value each, as JSON, or as they are for a text; returns the recipe."""
    values = values_of("b.gguf", TASKS if adapters is None else adapters)
    for name, content in {"recipe.yaml": values, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return folder / "recipe.yaml"


def problems_of(path: Path) -> list[str]:
    with pytest.raises(UsageError) as caught:
        Recipe.from_file(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_each_file_is_an_adapter_with_the_name_of_the_file_or_its_own(tmp_path: Path) -> None:
    files = {
        "tasks/lights.yaml": adapter_of(),
        "tasks/b.yaml": adapter_of("dora", name="blinds"),
        "tasks/notes.txt": "x",
    }
    recipe = Recipe.from_file(write(tmp_path, files, {**TASKS, "own": adapter_of()}))
    assert {name: spec.method.name for name, spec in recipe.adapters.items()} == {
        "own": "lora", "blinds": "dora", "lights": "lora",
    }  # fmt: skip
    assert Recipe.from_dict(values_of("b.gguf", TASKS), tmp_path).adapters.keys() == {"blinds", "lights"}


def test_a_pattern_that_matches_the_recipe_means_the_other_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"lights.yaml": adapter_of()}, {"from": "*.yaml"})
    assert list(Recipe.from_file(path).adapters) == ["lights"]


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    files = {
        "tasks/deep/lights.yaml": adapter_of(train="rows.jsonl", output={"schema": "answer.json"}),
        "tasks/deep/answer.json": {"type": "object", "properties": {"on": {"type": "boolean"}}},
        "tasks/notes.yaml": adapter_of({"name": "cartridge", "document": "../notes.txt"}, train="owner/name"),
    }
    recipe = Recipe.from_file(write(tmp_path, files, {"from": "tasks/**/*.yaml", "own": adapter_of()}))
    assert {name: spec.data.train for name, spec in recipe.adapters.items()} == {
        "own": str(tmp_path / "rows.jsonl"), "lights": str(tmp_path / "tasks/deep/rows.jsonl"), "notes": "owner/name",
    }  # fmt: skip
    notes = recipe.adapters["notes"].method.options.model_dump()
    assert notes["document"] == str(tmp_path / "tasks/../notes.txt")
    output = recipe.adapters["lights"].output
    assert output is not None and output.spec is not None and output.spec.kind == "schema"
    assert recipe.resolved()["adapters"]["lights"]["data"]["train"] == "tasks/deep/rows.jsonl"


def test_overrides_and_lists_of_patterns_work_and_a_saved_recipe_is_whole(tmp_path: Path) -> None:
    files = {"a/one.yaml": adapter_of(LORA), "b/two.yaml": adapter_of(LORA)}
    path = write(tmp_path, files, {"from": ["b/*.yaml", str(tmp_path / "a/*.yaml"), "*/two.yaml"]})
    recipe = Recipe.from_file(path, {"adapters.one.method.r": "8", "adapters.two.data.train": "other.jsonl"})
    ranks = {name: spec.method.options.model_dump()["r"] for name, spec in recipe.adapters.items()}
    assert list(ranks.items()) == [("two", 2), ("one", 8)]
    assert recipe.adapters["two"].data.train == str(tmp_path / "b/other.jsonl")
    again = Recipe.from_file(save_recipe(recipe, tmp_path / "saved"))
    assert again.adapters == recipe.adapters


def test_an_adapter_may_still_be_called_from(tmp_path: Path) -> None:
    assert list(Recipe.from_file(write(tmp_path, {}, {"from": adapter_of()})).adapters) == ["from"]


@pytest.mark.parametrize(
    ("files", "adapters", "lines"),
    [
        ({}, TASKS, [NO_MATCH.format("tasks/*.yaml")]),
        ({}, {"from": 5}, ["recipe.yaml:13: adapters.from: 5 is not a pattern; write one such as tasks/*.yaml"]),
        ({}, {"from": ["**x", "a\0"]}, [NO_MATCH.format("**x"), NO_MATCH.format(r"a\x00")]),
        (
            {"tasks/a.yaml": adapter_of(name="x"), "tasks/b.yaml": "data: {train: a}\nname: x\n"},
            TASKS,
            ["tasks/b.yaml:2: tasks/a.yaml has an adapter 'x' too; set another name"],
        ),
        (
            {"tasks/x.yaml": adapter_of()},
            {**TASKS, "x": adapter_of()},
            ["tasks/x.yaml:1: recipe.yaml has an adapter 'x' too; set another name"],
        ),
        (
            {"tasks/a.yaml": "data:\n  trian: a.jsonl\nsystm: x\n", "tasks/b.yaml": "scale: two\n"},
            TASKS,
            [
                "tasks/a.yaml:1: data.train: is missing",
                "tasks/a.yaml:2: data.trian: unknown key; did you mean 'train'?",
                "tasks/a.yaml:3: systm: unknown key; did you mean 'system'?",
                "tasks/b.yaml:1: data: is missing",
                "tasks/b.yaml:1: scale: 'two' is not a number",
            ],
        ),
        (
            {"tasks/A b.yaml": adapter_of(), "tasks/c.yaml": "data: {train: a}\nname: No\n"},
            TASKS,
            [
                "tasks/A b.yaml:1: 'A b' is not a valid name; use up to 100 of a-z, 0-9, _ and -, the first a-z or 0-9",
                "tasks/c.yaml:2: 'No' is not a valid name; use up to 100 of a-z, 0-9, _ and -, the first a-z or 0-9",
            ],
        ),
        (
            {"tasks/a.yaml": "", "tasks/b.yaml": "- 1\n", "tasks/c.yaml": "a: [\n", "tasks/d.yaml": "name: 5\n"},
            TASKS,
            [
                "tasks/a.yaml:1: the adapter is empty; see the template of `edgetune init`",
                "tasks/b.yaml:1: the adapter is not a mapping of keys to values; see the template of `edgetune init`",
                "tasks/c.yaml:2: not YAML: expected the node content, but found '<stream end>'",
                "tasks/d.yaml:1: name: 5 is not a string; put it in quotes",
            ],
        ),
    ],
)  # fmt: skip
def test_a_problem_names_the_file_and_its_line(
    files: dict[str, object], adapters: dict[str, Any], lines: list[str], tmp_path: Path
) -> None:
    assert problems_of(write(tmp_path, files, adapters)) == lines


def test_problems_of_the_recipe_come_before_those_of_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"tasks/a.yaml": "scale: two\n"})
    path.write_text(path.read_text(encoding="utf-8").replace('"threads": 1', '"threads": "many"'), encoding="utf-8")
    assert [line.partition(": ")[0] for line in problems_of(path)] == [
        "recipe.yaml:4",
        "tasks/a.yaml:1",
        "tasks/a.yaml:1",
    ]


def test_the_schema_takes_patterns() -> None:
    schema = json_schema()
    for adapters in (TASKS, {"from": ["a", "b"]}, {"from": adapter_of()}):
        jsonschema.validate(values_of("b.gguf", adapters), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values_of("b.gguf", {"from": 5}), schema)
