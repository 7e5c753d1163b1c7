from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.adapters import patterns
from edgetune_export.architectures.shape import SizedModule
from edgetune_runtime.errors import IncompatibleError, UsageError
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from tiny import make_model
from trainings import VARIANTS

from edgetune import methods
from edgetune.methods.common.base import trainable

LORA = methods.load("lora")


def attach(**options: object) -> Any:  # noqa: ANN401 - PEFT carries no types
    return LORA.attach(make_model("llama", 384), LORA.options.model_validate(options), 10)


def layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def test_methods_are_found_by_their_files_names() -> None:
    files = Path(methods.__file__).parent.glob("[!_]*.py")
    assert methods.names() == sorted([*(file.stem for file in files), *VARIANTS])
    assert all(methods.load(name).name == name for name in methods.names())
    assert LORA.shapes(LORA.options())[0] == "low_rank"


@pytest.mark.parametrize(("name", "of"), VARIANTS.items())
def test_a_variant_is_its_method_with_other_defaults(name: str, of: str) -> None:
    variant, method = methods.load(name), methods.load(of)
    assert isinstance(variant, type(method)) and issubclass(variant.options, method.options)
    defaults = [(each.options().model_dump(), getattr(each, "start", None)) for each in (variant, method)]
    assert defaults[0] != defaults[1]
    options = variant.options.model_validate({"rank": 4, "alpha": 3, "learning_rate_factor": 1})
    assert (options.r, options.lora_alpha, options.learning_rate_factor) == (4, 3, 1)
    assert not variant.wrote({"peft_type": "LORA"})


@pytest.mark.parametrize(("name", "hint"), [("lorra", "did you mean 'lora'?"), ("zzz", "choose one of: adalora, ")])
def test_an_unknown_method_is_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"no method '{name}'; {hint.replace('?', '[?]')}"):
        methods.load(name)


def test_options_have_pefts_names_and_the_short_ones() -> None:
    options = LORA.options.model_validate
    assert options({"rank": 4, "alpha": 6, "dropout": 0.1}) == options({"r": 4, "lora_alpha": 6, "lora_dropout": 0.1})
    for wrong in ({"r": 0}, {"ranks": 4}, {"lora_dropout": 1.0}, {"rank_pattern": {"q_proj": 0}}, {"lora_alpha": -1}):
        with pytest.raises(ValidationError):
            options(wrong)


def test_lora_adapts_all_linear_layers_but_the_head() -> None:
    model = attach(r=4)
    names = {name.rpartition(".")[2] for name in layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(layers(model)) == 14
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable(model))


@pytest.mark.parametrize("targets", [["q_proj"], "q_proj", ["self_attn.q_proj"]])
def test_target_modules_are_named_by_their_ends(targets: object) -> None:
    found = layers(attach(target_modules=targets))
    assert set(found) == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


def test_ranks_and_scales_follow_the_patterns() -> None:
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {r"layers\.1\..*v_proj": 6}}
    found = layers(attach(r=4, lora_alpha=8, **options))
    scales = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in found.items()}
    attention = "model.layers.{}.self_attn.{}_proj"
    assert scales[attention.format(0, "q")] == (9, pytest.approx(8 / 3))
    assert scales[attention.format(0, "v")] == (4, pytest.approx(8 / 2))
    assert scales[attention.format(1, "v")] == (4, pytest.approx(6 / 2))


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 1.0)
    with pytest.raises(IncompatibleError, match=r"rank_pattern takes more than 1 s; write module names"):
        LORA.check(LORA.options(rank_pattern={r"(\w|.)*!": 4}), [SizedModule("v_proj" * 9, "v_proj", 4, 4)], ())


def test_lora_plus_gives_b_its_own_learning_rate() -> None:
    options = LORA.options.model_validate({"r": 4, "loraplus_lr_ratio": 16})
    model = attach(r=4)
    a, b = LORA.parameter_groups(model, options, 1e-3)
    assert (a["lr"], b["lr"]) == (1e-3, pytest.approx(1.6e-2))
    names = {id(p): name for name, p in trainable(model)}
    assert all("lora_A" in names[id(p)] for p in a["params"])
    assert all("lora_B" in names[id(p)] for p in b["params"])
    assert len(a["params"]) + len(b["params"]) == len(names)
