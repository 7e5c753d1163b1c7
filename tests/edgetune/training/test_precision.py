from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_runtime.errors import UsageError
from recipes import adapter_of, make_recipe
from trainings import QUIET

from edgetune import methods
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.training.precision import require_int8

INT8 = {"precision": "int8"}


@pytest.mark.parametrize(
    ("method", "device", "machine", "why"),
    [
        ("lora", "cuda", "x86_64", "training runs on cuda, and int8 needs a CPU"),
        ("lora", "mps", "arm64", "training runs on mps, and int8 needs a CPU"),
        ("lora", "cpu", "aarch64", "this machine is aarch64, and int8 needs x86"),
        ("full", "cpu", "x86_64", "full trains the base's own weights, and int8 needs frozen weights"),
    ],
)
def test_int8_is_refused_where_it_cannot_be(
    method: str, device: str, machine: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(UsageError) as error:
        require_int8(methods.load(method), device)
    assert str(error.value) == f"training.precision is int8, but {why}; set training.precision: fp32"


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_int8_is_taken_on_x86(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    require_int8(methods.load("lora"), "cpu")


def test_plan_and_build_refuse_int8_for_methods_that_train_the_base(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), {"command": adapter_of("full")}, training=INT8)
    tell: list[Callable[[], Any]] = [
        lambda: plan_build(recipe),
        lambda: build(recipe, tmp_path / "out", progress=QUIET),
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
    base, keys = tiny_gguf("llama"), {"quantization": "q8_0", "context_length": 64, "training": INT8}
    with pytest.raises(UsageError, match=r"^domain.training.precision is int8, but full trains the base's own"):
        plan_build(make_recipe(tmp_path, base, domain=domain, **keys))
    own = {**domain, "training": {"precision": "fp32"}}
    assert plan_build(make_recipe(tmp_path, base, domain=own, **keys)).plan.needs is not None
