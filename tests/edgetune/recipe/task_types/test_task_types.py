from __future__ import annotations

from pathlib import Path

import pytest
from edgetune_export import backends
from edgetune_runtime import engines
from edgetune_runtime.bundle import TASKS
from edgetune_runtime.errors import UsageError

from edgetune.building import builders
from edgetune.recipe import task_types

FACTS = """
from edgetune.recipe.task_types.base import Refusal, TaskType

TASK_TYPE = TaskType(base="a tagger", not_offered={"fit": Refusal("is for taggers", "run it there")})
"""
# Nothing of the task is asked for here.
BUILDER = """
from edgetune.building.builders.text_generation import TextGeneration


class TextTagging(TextGeneration):
    task = "text-tagging"


BUILDER = TextTagging()
"""


@pytest.fixture
def tagging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a task whose two files are in a temporary folder."""
    for package, text in ((task_types, FACTS), (builders, BUILDER)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "text_tagging.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    return "text-tagging"


def test_the_runtime_knows_every_task_and_something_runs_and_writes_it() -> None:
    assert list(TASKS) == task_types.names()
    for task in TASKS:
        formats = backends.of_task(task)
        assert formats
        for target in formats:
            assert backends.load(target, task).SHAPES
            assert callable(engines.load(target, task).examine)
        assert builders.load(task).task == task


def test_a_task_is_found_by_its_files(tagging: str) -> None:
    assert tagging in task_types.names()
    assert task_types.load(tagging).base == "a tagger"
    assert builders.load(tagging).task == tagging


def test_a_command_that_a_task_does_not_support_is_refused_with_a_remedy(tagging: str) -> None:
    found = task_types.load(tagging)
    assert found.offers("trial") and not found.offers("fit")
    found.check_offers("trial", "--trial")
    with pytest.raises(UsageError, match=r"^home is for taggers; run it there$"):
        found.check_offers("fit", "home")


def test_the_error_about_an_unknown_task_lists_the_tasks() -> None:
    for load in (task_types.load, builders.load):
        with pytest.raises(UsageError, match="no task 'text-generatoin'; did you mean 'text-generation'"):
            load("text-generatoin")
    with pytest.raises(UsageError, match="gguf holds no models for text-classification; choose one of: onnx"):
        backends.load("gguf", "text-classification")
