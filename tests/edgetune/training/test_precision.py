from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError

from edgetune import methods
from edgetune.building.builders.plan import plan_build
from edgetune.building.pipeline import build
from edgetune.progress import Progress
from edgetune.recipe.model import Recipe
from edgetune.training.precision import require_int8


def recipe_of(folder: Path, base: Path, method: object, **keys: object) -> Recipe:
    rows = [{"prompt": f"turn on the light {number}", "completion": "reply on"} for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    adapters = {"command": {"method": method, "data": {"train": "rows.jsonl"}}}
    values = {"name": "home", "base": str(base), "training": {"precision": "int8"}, "adapters": adapters, **keys}
    return Recipe.model_validate(values, context={"folder": folder})


@pytest.mark.parametrize(
    ("method", "device", "machine", "why"),
    [
        ("lora", "cuda", "x86_64", "training runs on cuda, and int8 needs a CPU"),
        ("lora", "mps", "arm64", "training runs on mps, and int8 needs a CPU"),
        ("lora", "cpu", "aarch64", "this machine is aarch64, and int8 needs x86"),
        ("full", "cpu", "x86_64", "full trains the base's own weights, and int8 needs frozen weights"),
    ],
)
def test_int8_is_refused_where_it_cannot_be(method: str, device: str, machine: str, why: str) -> None:
    with pytest.raises(UsageError) as error:
        require_int8(methods.load(method), device, machine=machine)
    assert str(error.value) == f"training.precision is int8, but {why}; set training.precision: fp32"


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_int8_is_taken_on_x86(machine: str) -> None:
    require_int8(methods.load("lora"), "cpu", machine=machine)


def test_validate_and_build_refuse_it_for_what_trains_the_base(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_gguf("llama"), "full")
    tell: list[Callable[[], Any]] = [
        lambda: plan_build(recipe),
        lambda: build(recipe, tmp_path / "out", progress=Progress(quiet=True)),
    ]
    for run in tell:
        with pytest.raises(UsageError) as error:
            run()
        assert str(error.value).startswith("adapters.command.training.precision is int8, but full trains the base's")
        assert str(error.value).endswith("; set adapters.command.training.precision: fp32")
    assert not (tmp_path / "out").exists()


def test_a_domain_has_a_precision_of_its_own(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("turn on the light in the hall\n" * 400, encoding="utf-8")
    domain = {"data": {"train": "text.txt"}}
    keys = {"quantization": "q8_0", "context_length": 64}
    with pytest.raises(UsageError, match=r"^domain.training.precision is int8, but full trains the base's own"):
        plan_build(recipe_of(tmp_path, tiny_gguf("llama"), "lora", domain=domain, **keys))
    own = {**domain, "training": {"precision": "fp32"}}
    assert plan_build(recipe_of(tmp_path, tiny_gguf("llama"), "lora", domain=own, **keys)).plan.needs is not None
