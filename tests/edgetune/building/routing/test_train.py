"""Routers trained on rows of the smart-home example, and on small tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.inference.routing.classifier import probabilities
from recipes import adapter_of, lights, make_recipe, values_of

from edgetune.building.routing.train import train_router
from edgetune.common.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.shipping.exported import TrainedRouter
from edgetune.tasks.negatives import GENERAL_REQUESTS
from edgetune.tasks.task import read_task

SMART_HOME = Path(__file__).parents[4] / "examples" / "smart-home"
ROOMS = ("hall", "kitchen", "study", "attic", "garage", "bedroom", "cellar", "nursery", "bath", "garden")


def trained(recipe: Recipe) -> TrainedRouter:
    router = train_router(recipe, [read_task(name, recipe) for name in recipe.adapters], Progress(quiet=True))
    assert router is not None
    return router


def small(folder: Path, route: object = True, **tasks: Sequence[Mapping[str, Any]]) -> Recipe:
    rows = {
        "lamps": [{"prompt": f"turn on the lamp in the {room}", "completion": room} for room in ROOMS],
        "songs": [{"prompt": f"play {count} songs by the band", "completion": str(count)} for count in range(10)],
        **tasks,
    }
    adapters = {name: adapter_of(train=f"{name}.jsonl", held_out=0.3) for name in rows}
    return make_recipe(folder, "base.gguf", adapters, data={f"{n}.jsonl": r for n, r in rows.items()}, route=route)


def choice(router: TrainedRouter, call: str, prompt: str) -> str | None:
    routed, chances = router.calls[call], probabilities(router.classifiers[call].log_odds(prompt))
    return routed.adapters[int(chances.argmax())] if chances.max() >= routed.threshold else None


@pytest.fixture(scope="module")
def smart_home() -> TrainedRouter:
    return trained(Recipe.from_file(SMART_HOME / "recipe.yaml", {"route": True}))


def test_prompts_of_smart_home_get_to_their_adapter(smart_home: TrainedRouter) -> None:
    calls = {"command": "generate", "reply": "generate", "intent": "classify"}
    right = []
    for name, call in calls.items():
        for line in (SMART_HOME / "data" / f"{name}-test.jsonl").read_text().splitlines():
            row = json.loads(line)
            prompt = row.get("prompt") or row.get("text") or row["messages"][0]["content"]
            right.append(choice(smart_home, call, prompt) == name)
    assert np.mean(right) >= 0.97
    shares = [share for call in smart_home.calls.values() for share in call.right.values()]
    assert np.mean(shares) >= 0.97


def test_most_prompts_of_none_get_to_none(smart_home: TrainedRouter) -> None:
    assert smart_home.calls["generate"].none_found >= 0.8
    asked = ["Who wrote Hamlet?", "Fix this bug: x = y + ;", "Translate the letter into Dutch.", "Why do leaves fall?"]
    assert [choice(smart_home, "generate", prompt) for prompt in asked] == [None] * 4


def test_a_task_with_labels_is_left_to_classify_if_its_prompts_are_those_of_another(smart_home: TrainedRouter) -> None:
    assert smart_home.calls["generate"].adapters == ("command", "reply")
    assert smart_home.calls["classify"].adapters == ("intent",)


def test_a_task_with_labels_and_prompts_of_its_own_is_also_for_generate(tmp_path: Path) -> None:
    moods = [{"text": f"I feel {'great' if n % 2 else 'sad'} on day {n}", "label": str(n % 2)} for n in range(20)]
    router = trained(small(tmp_path, moods=moods))
    assert router.calls["generate"].adapters == ("lamps", "songs", "moods")
    assert choice(router, "generate", "I feel great on day 77") == "moods"


def test_the_same_rows_give_the_same_router(tmp_path: Path) -> None:
    one, other = trained(small(tmp_path)), trained(small(tmp_path))
    np.testing.assert_array_equal(one.classifiers["generate"].weights, other.classifiers["generate"].weights)
    assert one.calls == other.calls


def test_the_recipe_sets_threshold_fallback_and_adapters(tmp_path: Path) -> None:
    more = [{"prompt": f"sum of {number} and 1", "completion": "2"} for number in range(10)]
    route = {"threshold": 0.9, "below": "songs", "adapters": ["lamps", "songs"]}
    router = trained(small(tmp_path, route, sums=more))
    assert router.below == "songs"
    assert router.calls["generate"].threshold == 0.9
    assert router.calls["generate"].adapters == ("lamps", "songs")


def test_rows_without_a_prompt_are_refused(tmp_path: Path) -> None:
    recipe = small(tmp_path, texts=[{"text": f"Plain text number {number}."} for number in range(10)])
    with pytest.raises(UsageError, match=r"texts\.jsonl:\d+: has no message of the user.*route\.adapters"):
        trained(recipe)


def test_a_task_whose_validation_rows_are_all_out_of_scope_is_refused() -> None:
    moods = [{"text": f"I feel {'great' if n % 2 else 'sad'} on day {n}", "label": str(n % 2)} for n in range(20)]
    others = [{"text": f"what is {n} times two", "label": "out_of_scope"} for n in range(5)]
    data = {"train": moods, "validation": others}
    adapters = {"moods": {"data": data, "out_of_scope": True}, "songs": adapter_of(train=lights())}
    recipe = Recipe.from_dict(values_of("base.gguf", adapters, route=True))
    with pytest.raises(UsageError, match=r"'moods': all validation rows are out of scope.*data\.validation"):
        trained(recipe)


def test_the_general_requests_are_different() -> None:
    assert len(set(GENERAL_REQUESTS)) == len(GENERAL_REQUESTS) >= 300
