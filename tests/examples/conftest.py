"""The bundles of the examples, on tiny bases: their adapters learn a few rows by heart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import make_recipe
from runtime.bundles import Adapter, low_rank, write_bundle

from edgetune.building.pipeline import build
from edgetune.common.progress import Progress

EXAMPLES = Path(__file__).parents[2] / "examples"
ORDERS = {
    "turn off the lamp in the hall": {"service": "light.turn_off", "area": "hall"},
    "open the blind in the living room": {"service": "cover.open", "area": "living room"},
    "time to play": {"service": "timer.start", "minutes": 5},
}
INTENTS = dict(zip(ORDERS, ("light", "cover", "timer"), strict=True)) | {"what is the weather": "weather"}
REPLIES = {f"done: {json.dumps(call)}": f"Certainly, {call['service']}." for call in ORDERS.values()} | {
    "weather tomorrow: light rain": "If I may, light rain."
}


def pairs(rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


@pytest.fixture(scope="session")
def home_bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the adapters of the smart home, which know ORDERS, INTENTS and REPLIES."""
    folder = tmp_path_factory.mktemp("home")
    intents = [{"text": text, "label": label} for text, label in INTENTS.items()]
    data = {"command": pairs(ORDERS), "intent": intents, "reply": pairs(REPLIES)}
    own = {"command": {"output": "auto"}, "intent": {"metric": "label"}, "reply": {}}
    method = {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    # Each learns and validates on all of its rows.
    adapters = {
        name: {"data": {"train": f"{name}.jsonl", "validation": f"{name}-again.jsonl"}, "method": method, **own[name]}
        for name in data
    }
    recipe = make_recipe(
        folder,
        tiny_gguf("llama"),
        adapters,
        data={f"{name}{end}.jsonl": rows for name, rows in data.items() for end in ("", "-again")},
        training={"max_steps": 40, "epochs": 40, "learning_rate": 1e-2, "evals": 1},
        context_length=512,
    )
    return build(recipe, folder / "home", progress=Progress(quiet=True)).bundle


@pytest.fixture(scope="session")
def talking_bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose adapter `reply` fills the context with its answer to PROMPT."""
    base = tiny_gguf("llama")
    adapters = {"reply": Adapter(low_rank(base, seed=1))}
    return write_bundle(tmp_path_factory.mktemp("talking") / "home", base, adapters, context_length=512)
