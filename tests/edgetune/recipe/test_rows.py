from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, values_of, write_rows

from edgetune.recipe import rows as rows_module
from edgetune.recipe.model import Recipe
from edgetune.recipe.rows import Rows
from edgetune.recipe.saved import RECIPE, save_recipe
from edgetune.tasks.data import read_rows
from edgetune.tasks.task import Texts, read_texts

EXAMPLES = Path(__file__).parents[3] / "examples"
ROWS = [{"text": "play", "label": "media"}, {"text": "lock the door", "label": "lock"}]
FEATURES = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["lock", "media"]))


def recipe_of(train: object, **keys: object) -> Recipe:
    return Recipe.from_dict({**values_of("x.gguf", {"intent": adapter_of(train=train)}), **keys})


def of_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["play", "lock the door"], "label": [1, 0]}, features=FEATURES)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS,
        lambda: tuple(map(MappingProxyType, ROWS)),
        lambda: iter(ROWS),
        lambda: (row for row in ROWS),
        lambda: pd.DataFrame(ROWS),
        of_dataset,
        lambda: of_dataset().to_iterable_dataset(),
    ],
    ids=["list", "mappings", "iterator", "generator", "pandas", "dataset", "iterable dataset"],
)
def test_rows_of_each_kind_read_like_those_of_a_file(make: Callable[[], object], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "intent.jsonl", ROWS)
    train = recipe_of(make()).adapters["intent"].data.train
    assert [(row.messages, row.completion) for row in read_rows(train)] == [
        (row.messages, row.completion) for row in read_rows(str(path))
    ]
    assert [row.where for row in read_rows(train)] == [f"adapters.intent.data.train row {n}" for n in (1, 2)]


def test_all_rows_of_a_task_can_be_given_in_python() -> None:
    data = recipe_of(ROWS, adapters={"intent": {"data": {"train": ROWS, "validation": ROWS, "confidence": ROWS}}})
    assert [str(source) for _, source in data.sources()] == [
        f"adapters.intent.data.{key}" for key in ("train", "validation", "confidence")
    ]


def test_values_of_numpy_and_missing_values_of_pandas_become_json() -> None:
    frame = pd.DataFrame({"prompt": ["a", None], "n": [1.5, float("nan")], "list": [np.array([1, 2]), [3]]})
    assert [json.loads(line) for line in Rows.of("data", frame).lines] == [
        {"prompt": "a", "n": 1.5, "list": [1, 2]},
        {"prompt": None, "n": None, "list": [3]},
    ]


def test_the_manifest_says_that_rows_came_from_memory() -> None:
    recipe = recipe_of(iter(ROWS))
    train = recipe.resolved()["adapters"]["intent"]["data"]["train"]
    assert train.startswith("2 rows from memory, sha256 ")
    # The same rows have the same digest, and the result can be read as a recipe.
    assert Recipe.from_dict(recipe_of(ROWS).resolved()).adapters["intent"].data.train == train


def test_a_domain_takes_rows_of_text() -> None:
    data = {"train": [{"text": "one"}], "validation": ({"text": text} for text in ("two", "three"))}
    assert read_texts(recipe_of(ROWS, domain={"data": data})) == Texts(["one"], ["two", "three"])


def failing() -> Iterator[dict[str, str]]:
    yield ROWS[0]
    raise ConnectionError("gone")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (5, r"adapters.intent.data.train is 5, not rows; give a file, a hub id, or rows: a list"),
        ({"text": ["play"]}, r"adapters.intent.data.train is {'text': \['play'\]}, not rows; give"),
        ([ROWS[0], 7], r"adapters.intent.data.train row 2 is 7, not a mapping; give"),
        (
            datasets.DatasetDict(train=of_dataset(), test=of_dataset()),
            r"train is a dataset with splits, not rows; give one of them: train, test$",
        ),
        ("play", r"no data file play"),
        (["play"], r"adapters.intent.data.train row 1 is 'play', not a mapping"),
        (failing(), r"train row 2 cannot be read: the iterator raised ConnectionError: gone; correct it"),
        ([{"text": object()}], r"train row 1 is not JSON: it has a value of type object; use texts"),
        (np.zeros((1, 2, 2)), r"data.train row 1 is array\(\[\[0., 0.\], \[0., 0.\]\]\), not a mapping"),
        ([], r"adapters.intent.data.train has no rows"),
        ([ROWS[0], {"text": "stop"}, {"text": "", "label": "media"}], r"train row 3: text is empty"),
        ([{"text": "play", "label": float("nan")}], r"train row 1: not JSON: NaN is not a JSON number"),
        (pd.DataFrame([["a", "b", "c"]], columns=["text", "label", "label"]), r"train has two columns 'label'; rename"),
        ([{"x": 1}], r"train row 1: has none of messages, prompt and completion"),
    ],
)
def test_rows_that_are_no_rows_are_one_error(train: object, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        read_rows(recipe_of(train).adapters["intent"].data.train)
    assert error.type.__name__ in {"UsageError", "NotFoundError"}
    assert "\n" not in str(error.value)


def test_endless_rows_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROWS", 1000)
    with pytest.raises(UsageError, match=r"train has more than 1,000 rows or 1,000 MB; write them to a .jsonl file"):
        recipe_of(itertools.repeat(ROWS[0]))
    monkeypatch.setattr(rows_module, "MAX_BYTES", 10**6)
    with pytest.raises(UsageError, match="or 1 MB"):
        recipe_of([{"text": "x" * 10**6}])


SELF: dict[str, Any] = {}
SELF["training"] = SELF


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tarnets": []}, r"^recipe: tarnets: unknown key; did you mean 'targets'\?$"),
        ({"training": {"epochs": "x"}, "seed": 1}, r"^recipe: training.epochs: 'x' is not a number\nrecipe: seed: unk"),
        ({"adapters": 3}, r"^recipe: adapters: 3 is not a mapping of keys to values$"),
        (SELF, r"^the recipe is nested too deeply"),
    ],
)
def test_a_recipe_of_python_has_its_problems_in_one_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(ROWS, **values)


def test_a_value_that_is_no_recipe_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^5 is not a recipe; give a Recipe, the path of a recipe file, or a mapping$"
    ):
        Recipe.from_dict(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["smart-home/recipe", "smart-home/quick", "triage/sort", "triage/reply"])
def test_a_saved_recipe_is_read_again_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = Recipe.from_file(EXAMPLES / f"{name}.yaml", {"training.memory_mb": 900})
    saved = Recipe.from_file(save_recipe(recipe, tmp_path))
    assert saved.model_dump() == recipe.model_dump()
    assert saved.model_dump(exclude_unset=True) == recipe.model_dump(exclude_unset=True)


def test_a_saved_recipe_starts_from_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = values_of("x.gguf", {"one": adapter_of(start_from="old")})
    Path("some").mkdir()
    Path("some/recipe.json").write_text(json.dumps(values), encoding="utf-8")
    saved = Recipe.from_file(save_recipe(Recipe.from_file(Path("some/recipe.json")), tmp_path / "saved"))
    assert saved.adapters["one"].start_from == str(tmp_path / "some/old")


def test_a_saved_recipe_has_its_rows_in_files(tmp_path: Path) -> None:
    saved = Recipe.from_file(save_recipe(recipe_of(ROWS), tmp_path)).adapters["intent"].data.train
    assert saved == str(tmp_path / "adapters.intent.data.train.jsonl")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    saved = Recipe.from_file(moved / RECIPE).adapters["intent"].data.train
    assert [row.completion for row in read_rows(saved)] == ["media", "lock"]


def test_a_saved_recipe_has_the_same_characters(tmp_path: Path) -> None:
    system = "😀 of élan\u2028 and\x85\ufeff, \\U0001f600, 👩\u200d🚀 and \xad\U000e0041"
    recipe = recipe_of(ROWS, adapters={"intent": adapter_of(train=ROWS, system=system)})
    path = save_recipe(recipe, tmp_path)
    assert Recipe.from_file(path).adapters["intent"].system == system
    assert json.loads(path.read_text(encoding="utf-8"))["adapters"]["intent"]["system"] == system
