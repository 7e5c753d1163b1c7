"""The bundles of the examples, on tiny bases: their adapters learn a few rows by heart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from runtime.bundles import Adapter, low_rank, write_bundle

from edgetune.building.pipeline import build
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe

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


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write rows to a file; returns the `data` of an adapter that learns and validates on all of them."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return {"train": path.name, "validation": path.name}


@pytest.fixture(scope="session")
def home_bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the adapters of the smart home, which know ORDERS, INTENTS and REPLIES."""
    folder = tmp_path_factory.mktemp("home")
    intents = [{"text": text, "label": label} for text, label in INTENTS.items()]
    adapters = {
        "command": {"data": write_rows(folder / "command.jsonl", pairs(ORDERS)), "output": "auto"},
        "intent": {"data": write_rows(folder / "intent.jsonl", intents), "metric": "label"},
        "reply": {"data": write_rows(folder / "reply.jsonl", pairs(REPLIES))},
    }
    training = {"max_steps": 40, "epochs": 40, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "evals": 1}
    method = {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    recipe = {
        "name": "home",
        "base": str(tiny_gguf("llama")),
        "threads": 1,
        "context_length": 512,
        "training": training,
        "adapters": {name: {**adapter, "method": method} for name, adapter in adapters.items()},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert build(Recipe.from_file(folder / "recipe.yaml"), folder / "home", progress=Progress(quiet=True)) is not None
    return folder / "home"


@pytest.fixture(scope="session")
def talking_bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose adapter `reply` fills the context with its answer to PROMPT."""
    base = tiny_gguf("llama")
    adapters = {"reply": Adapter(low_rank(base, seed=1))}
    return write_bundle(tmp_path_factory.mktemp("talking") / "home", base, adapters, context_length=512)
