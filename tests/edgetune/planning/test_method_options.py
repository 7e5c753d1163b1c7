"""Options of methods that do not fit the base end in one line before any training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.errors import EdgetuneError
from recipes import adapter_of, make_recipe
from tiny import ENCODERS
from torch import nn

from edgetune import bases
from edgetune.building.encoder import base as encoder
from edgetune.building.plan import plan_build
from edgetune.planning.build import plan_bundle
from edgetune.recipe.model import Recipe
from edgetune.recipe.targets import shapes_of


def plan(recipe: Recipe) -> None:
    plan_bundle(recipe, bases.find(recipe), shapes_of(recipe))


def refused(recipe: Recipe) -> str:
    with pytest.raises(EdgetuneError) as caught:
        plan(recipe)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (
            {"name": "lora", "target_modules": ["v_proj", "q_porj"]},
            "the base has no module 'q_porj'; did you mean 'q_proj'? Or set target_modules to all-linear, or to some",
        ),
        ({"name": "pissa", "target_modules": []}, "target_modules names no module; list some, or use all-linear"),
        ({"name": "lora", "rank_pattern": {"q_porj": 4}}, "rank_pattern 'q_porj' matches no adapted module; use one"),
        (
            {"name": "lora", "alpha_pattern": {"layers.7.q_proj": 4}},
            "alpha_pattern 'layers.7.q_proj' matches no adapted module",
        ),
        ({"name": "rslora", "alpha_pattern": {"(": 4}}, "alpha_pattern '(' matches no adapted module"),
        ({"name": "alora", "target_modules": ["q_proj", "lm_head"]}, "alora cannot adapt lm_head"),
        ({"name": "prefix", "init_tokens": [3, 99999]}, "init_tokens has 99999, and the base has"),
        (
            {"name": "cartridge", "document": "a.txt", "init_tokens": [99999]},
            "init_tokens has 99999, and the base has",
        ),
        ({"name": "alora", "invocation_tokens": [99999]}, "invocation_tokens has 99999, and the base has"),
        (
            {"name": "ia3", "feedforward_modules": ["down_porj"]},
            "the base has no module 'down_porj'; did you mean 'down_proj'? Or set feedforward_modules to some of",
        ),
    ],
)
def test_options_that_do_not_fit_the_base_are_refused(
    method: object, problem: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = {"fits": adapter_of(), "command": adapter_of(method)}
    assert f"adapter 'command': {problem}" in refused(make_recipe(tmp_path, tiny_gguf("qwen2"), adapters))


@pytest.mark.parametrize(
    ("method", "keys", "unable"),
    [
        ("lora", {}, "gguf"),
        ("lokr", {"targets": ["gguf", "onnx"]}, "gguf"),
        ("lora", {"targets": ["onnx"], "merged": True}, "onnx"),
        ("ia3", {}, "gguf"),
    ],
)
def test_an_output_layer_that_is_the_embedding_is_refused(
    method: str, keys: dict[str, Any], unable: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = {"name": method, "target_modules": ["q_proj", "lm_head"]}
    adapters = {"command": adapter_of(chosen, merged=keys.get("merged", False))}
    recipe = partial(make_recipe, tmp_path, adapters=adapters, targets=keys.get("targets", ["gguf"]))
    message = f"{unable} cannot change lm_head, which is the token embedding of this base; leave lm_head out of"
    assert message in refused(recipe(base=tiny_gguf("llama")))
    plan(recipe(base=tiny_gguf("qwen2")))


def test_onnx_adapts_an_output_layer_that_is_the_embedding(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    adapters = {"command": adapter_of({"name": "lora", "target_modules": ["lm_head"]})}
    plan(make_recipe(tmp_path, tiny_gguf("llama"), adapters, targets=["onnx"]))


@pytest.mark.parametrize("options", [{"r": 8, "decompose_factor": 8}, {"r": 500, "decompose_factor": 2}])
def test_a_kronecker_product_of_full_rank_is_refused_unless_it_is_merged(
    options: dict[str, int], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    method, base = {"name": "lokr", **options}, tiny_gguf("llama")
    problem = "the update of 64x64 weights has full rank (64); lower r or decompose_factor, or set merged: true"
    adapters = {"command": adapter_of(method)}
    assert refused(make_recipe(tmp_path, base, adapters)) == f"adapter 'command': {problem}"
    plan(make_recipe(tmp_path, base, {"command": adapter_of(method, merged=True)}))


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_more_components_than_the_smallest_module_has_are_refused(
    method: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    def of_rank(r: int) -> Recipe:
        return make_recipe(tmp_path, tiny_gguf("llama"), {"command": adapter_of({"name": method, "r": r})})

    problem = "r is 33, but model.layers.0.self_attn.k_proj has 32x64 weights; set r to 32 or less, or use other target"
    assert f"adapter 'command': {problem}" in refused(of_rank(33))
    plan(of_rank(32))


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning", "cartridge"])
def test_virtual_tokens_in_blocks_are_refused(method: str, tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    problem = "dtype is q8_0, which gguf has for low-rank adapters only, not for the shape prefix; set dtype to"
    assert problem in refused(make_recipe(tmp_path, base, {"command": adapter_of(method, dtype="q8_0")}))
    plan(make_recipe(tmp_path, base, {"command": adapter_of(method, dtype="q8_0")}, targets=["onnx"]))


@pytest.mark.parametrize(("context_length", "longest"), [(None, 512), (256, 256)])
def test_virtual_tokens_that_fill_the_context_are_refused(
    context_length: int | None, longest: int, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = {"command": adapter_of({"name": "prefix", "num_virtual_tokens": 600})}
    keys = {} if context_length is None else {"context_length": context_length}
    problem = f"num_virtual_tokens is 600, but the context has {longest} tokens; give fewer than {longest}"
    assert refused(make_recipe(tmp_path, tiny_gguf("llama"), adapters, **keys)) == f"adapter 'command': {problem}"


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        (None, "is not a PEFT adapter: it has no adapter_config.json; use a folder written by PEFT's save_pretrained"),
        ({"r": 8, "lora_alpha": 32}, "has r 8 and not 16, so training cannot start from it; give the method the opti"),
        ({"r": 16, "lora_alpha": 8}, "has lora_alpha 8 and not 32"),
        ({"r": 16, "lora_alpha": 32, "rank_pattern": {"q_proj": 2}}, "has rank_pattern {'q_proj': 2} and not {}"),
    ],
)
def test_a_start_with_other_options_is_refused(
    saved: dict[str, object] | None, problem: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    start = tmp_path / "old"
    if saved is not None:
        start.mkdir()
        (start / "adapter_config.json").write_text(json.dumps(saved))
        (start / "adapter_model.safetensors").touch()
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), {"command": adapter_of(start_from="old")})
    with pytest.raises(EdgetuneError, match=f"^adapter 'command': .*{re.escape(problem)}"):
        plan_build(recipe)


def test_the_method_of_a_domain_is_checked_too(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    domain = {"data": {"train": "texts.txt"}, "method": {"name": "lora", "rank_pattern": {"q_porj": 4}}}
    message = refused(make_recipe(tmp_path, tiny_gguf("llama"), domain=domain))
    assert message.startswith("domain.method: rank_pattern 'q_porj' matches no adapted module")


@pytest.mark.parametrize("arch", ENCODERS)
def test_the_linear_modules_of_an_encoder_are_known_without_its_weights(
    arch: str, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = bases.find(make_recipe(tmp_path, tiny_encoder(arch), task="text-classification"))
    assert source is not None
    model = encoder.load_torch(encoder.make(source), torch.float32)
    linear = {name: tuple(part.weight.shape) for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert {module.name: (module.rows, module.columns) for module in source.linear_modules} == linear


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"target_modules": ["q_proj"]}, "the base has no module 'q_proj'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern 'q_proj' matches no adapted module; use one of dense, "),
    ],
)
def test_options_that_do_not_fit_an_encoder_are_refused(
    options: dict[str, object], problem: str, tiny_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = {"command": adapter_of({"name": "lora", **options})}
    message = refused(make_recipe(tmp_path, tiny_encoder("bert"), adapters, task="text-classification"))
    assert f"adapter 'command': {problem}" in message
