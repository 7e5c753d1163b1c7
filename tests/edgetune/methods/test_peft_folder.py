"""PEFT folders from elsewhere are checked before PEFT reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_export.adapters import patterns
from edgetune_export.adapters.fold import CONFIG_NAME, WEIGHTS_NAME
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, VerificationError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.methods.common.base import Checkpoint
from edgetune.methods.common.peft import load_peft, peft_model

# Takes exponential time on a name such as model.layers.0.self_attn.q_proj.
ENDLESS = r"(\w|.)*!"
OPTIONS: dict[str, dict[str, Any]] = {
    "ia3": {"target_modules": ["v_proj"]},
    "oft": {"target_modules": ["q_proj"], "oft_block_size": 8},
    "prompt": {"num_virtual_tokens": 3},
}


@pytest.fixture
def base() -> PreTrainedModel:
    return make_model("llama", 384)


def saved(folder: Path, base: PreTrainedModel, method: str = "loha", **config: object) -> Checkpoint:
    """A checkpoint of a method as PEFT saves it, with changes of its config."""
    kind: Any = methods.load(method)
    options = kind.options.model_validate(OPTIONS.get(method, {"r": 4, "target_modules": ["q_proj"]}))
    model = kind.attach(base, options, 10)
    kind.save(model, folder)
    kind.detach(model)
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return Checkpoint(method, folder, base, options)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder."""
    path = folder / WEIGHTS_NAME
    save_file(change(load_file(path)), path)


def trained_in(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The adapter's values in PEFT's model."""
    with peft_model(checkpoint) as model:
        return {name: values.clone() for name, values in model.state_dict().items() if ".default" in name}


def refused(checkpoint: Checkpoint, error: type[EdgetuneError], message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        load_peft(checkpoint)
    assert "\n" not in str(caught.value) and time.monotonic() < begin + 30


def test_a_pickle_of_weights_is_never_read(tmp_path: Path, base: PreTrainedModel) -> None:
    checkpoint = saved(tmp_path, base, "vera")
    torch.save(load_file(tmp_path / WEIGHTS_NAME), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS_NAME).unlink()
    refused(checkpoint, IncompatibleError, "adapter_model.bin, a pickle")
    (tmp_path / "adapter_model.bin").unlink()
    refused(checkpoint, NotFoundError, f"has no {WEIGHTS_NAME}")


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
)
def test_a_regular_expression_that_never_ends_is_refused(
    config: dict[str, Any], tmp_path: Path, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 1.0)
    refused(saved(tmp_path, base, **config), IncompatibleError, "takes more than 1 s; write module names")


@pytest.mark.parametrize("config", [{"rank_pattern": {"(": 4}}, {"target_modules": "("}])
def test_an_invalid_regular_expression_is_named(config: dict[str, Any], tmp_path: Path, base: PreTrainedModel) -> None:
    refused(saved(tmp_path, base, **config), VerificationError, "is not a regular expression")


@pytest.mark.parametrize("key", ["megatron_config", "modules_to_save", "layer_replication"])
def test_options_that_load_something_else_are_refused(key: str, tmp_path: Path, base: PreTrainedModel) -> None:
    refused(saved(tmp_path, base, **{key: ["os"]}), IncompatibleError, f"has {key}, which is not supported")


def test_an_initialization_that_changes_the_base_is_refused(tmp_path: Path, base: PreTrainedModel) -> None:
    before = {name: values.clone() for name, values in base.state_dict().items()}
    message = "has init_lora_weights: pissa, which is not supported; save it again with"
    refused(saved(tmp_path, base, "dora", init_lora_weights="pissa"), IncompatibleError, message)
    assert all(torch.equal(values, before[name]) for name, values in base.state_dict().items())


@pytest.mark.parametrize("method", ["adalora", "dora", "loha", "lora", "oft", "vera"])
def test_trained_biases_are_refused_for_every_method(method: str, tmp_path: Path, base: PreTrainedModel) -> None:
    message = "has bias: all, which is not supported; train with bias: none, or merge it with"
    refused(saved(tmp_path, base, method, bias="all"), IncompatibleError, message)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("dora", "base_model.model.model.embed_tokens.weight"),
        ("lora", "base_model.model.lm_head.weight"),
        ("loha", "_orig_mod.base_model.model.model.layers.0.input_layernorm.weight"),
        ("dora", "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"),
        ("prompt", "base_model.lm_head.weight"),
    ],
)
def test_trained_values_of_the_base_are_refused_and_leave_it_as_it_was(method: str, key: str, tmp_path: Path) -> None:
    base = make_model("qwen2", 384)
    checkpoint = saved(tmp_path, base, method)
    before = {name: values.clone() for name, values in base.state_dict().items()}
    name = key.removeprefix("_orig_mod.")
    own = name.removeprefix("base_model.").removeprefix("model.").replace(".base_layer", "")
    edit(tmp_path, lambda tensors: {**tensors, key: torch.zeros_like(before[own])})
    message = f"has trained values of the base: {name}; train without biases, embeddings and modules_to_save, or merge"
    refused(checkpoint, IncompatibleError, message)
    assert all(torch.equal(values, before[name]) for name, values in base.state_dict().items())


# PEFT warns of what edgetune refuses.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_embeddings_is_refused(tmp_path: Path, base: PreTrainedModel) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"])
    get_peft_model(make_model("llama", 384), config).save_pretrained(tmp_path, save_embedding_layers=True)
    kind: Any = methods.load("dora")
    message = "changes model.embed_tokens, which is not a linear layer; train only linear layers, or merge it with"
    refused(Checkpoint("a", tmp_path, base, kind.options()), IncompatibleError, message)


@pytest.mark.parametrize("method", ["dora", "loha", "lora", "vera"])
@pytest.mark.parametrize(
    ("part", "written"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.", "module.base_model."),
        ("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("model.layers.", "model.language_model.layers."),
        ("model.layers.", "language_model.model.layers."),
    ],
)
def test_names_that_other_trainers_write_load_as_those_of_peft(
    method: str, part: str, written: str, tmp_path: Path, base: PreTrainedModel
) -> None:
    checkpoint = saved(tmp_path, base, method)
    edit(tmp_path, lambda tensors: {name: torch.randn_like(values) for name, values in tensors.items()})
    expected = trained_in(checkpoint)
    edit(tmp_path, lambda tensors: {name.replace(part, written, 1): values for name, values in tensors.items()})
    assert any(written in name for name in load_file(tmp_path / WEIGHTS_NAME))
    found = trained_in(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


def test_two_tensors_of_one_name_are_refused(tmp_path: Path, base: PreTrainedModel) -> None:
    checkpoint = saved(tmp_path, base)
    edit(tmp_path, lambda tensors: {**tensors, **{f"module.{name}": 2 * values for name, values in tensors.items()}})
    refused(checkpoint, VerificationError, "has two tensors for 'base_model.model.model.layers")


@pytest.mark.parametrize("method", ["adalora", "dora", "ia3", "loha", "lokr", "lora", "oft", "vera"])
def test_tensors_that_peft_lacks_or_does_not_know_are_refused(
    method: str, tmp_path: Path, base: PreTrainedModel
) -> None:
    checkpoint = saved(tmp_path, base, method)
    first = min(load_file(tmp_path / WEIGHTS_NAME))
    edit(tmp_path, lambda tensors: {name: values for name, values in tensors.items() if name != first})
    refused(checkpoint, IncompatibleError, "does not fit adapter_config.json and the base: it lacks .*layers.0.*; use")
    edit(tmp_path, lambda tensors: {**tensors, "base_model.model.model.layers.9.x": torch.zeros(1)})
    refused(checkpoint, IncompatibleError, "model.layers.9.x is unknown; use the base that")


@pytest.mark.parametrize("rank", [10**12, 10**30])
@pytest.mark.parametrize(
    ("method", "key"), [("loha", "r"), ("dora", "r"), ("vera", "r"), ("prompt", "num_virtual_tokens")]
)
def test_sizes_other_than_those_of_the_file_take_no_memory(
    method: str, key: str, rank: int, tmp_path: Path, base: PreTrainedModel
) -> None:
    message = "PEFT cannot load .*: size mismatch for .*" if rank < 2**63 else "PEFT cannot load"
    refused(saved(tmp_path, base, method, **{key: rank}), IncompatibleError, message)


def test_weights_that_are_not_floats_are_refused(tmp_path: Path, base: PreTrainedModel) -> None:
    checkpoint = saved(tmp_path, base)
    edit(tmp_path, lambda tensors: {name: values.to(torch.int8) for name, values in tensors.items()})
    refused(checkpoint, IncompatibleError, "has dtype I8; save the adapter in one of")


# PEFT warns of its own names.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_an_adalora_with_the_ranks_that_peft_kept_is_read(tmp_path: Path, base: PreTrainedModel) -> None:
    kept = torch.tensor([True, False, True, True, False, False])
    checkpoint, kind = saved(tmp_path, base, "adalora"), methods.load("adalora")

    def pruned(name: str, values: torch.Tensor) -> torch.Tensor:
        return values * kept[:, None] if name.endswith("lora_E") else torch.randn_like(values)

    def reduced(name: str, values: torch.Tensor) -> torch.Tensor:
        return values[:, kept] if name.endswith("lora_B") else values[kept]

    edit(tmp_path, lambda tensors: {name: pruned(name, torch.ones_like(values)) for name, values in tensors.items()})
    expected: Any = kind.fold(checkpoint, "low_rank")
    edit(tmp_path, lambda tensors: {name: reduced(name, values) for name, values in tensors.items()})
    path = tmp_path / CONFIG_NAME
    ranks = {f"model.layers.{layer}.self_attn.q_proj.lora_E": kept.tolist() for layer in range(2)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": ranks}))
    found: Any = kind.fold(checkpoint, "low_rank")
    assert len(found.modules) == 2
    for name, delta in found.modules.items():
        assert delta.rank == 3
        np.testing.assert_allclose(delta.b @ delta.a, expected.modules[name].b @ expected.modules[name].a, rtol=1e-5)


def test_a_start_is_read_like_an_adapter_to_ship(tmp_path: Path, base: PreTrainedModel) -> None:
    kind: Any = methods.load("lora")
    checkpoint = saved(tmp_path, base, "lora")
    edit(tmp_path, lambda tensors: {f"module.{name}": torch.ones_like(values) for name, values in tensors.items()})
    model = kind.attach(base, checkpoint.options, 10)
    kind.start_from(model, tmp_path, checkpoint.options)
    assert all(values.eq(1).all() for name, values in model.named_parameters() if ".lora_" in name)
    edit(tmp_path, lambda tensors: {**tensors, "base_model.model.lm_head.weight": torch.zeros(384, 64)})
    with pytest.raises(IncompatibleError, match=r"lm_head\.weight"):
        kind.start_from(model, tmp_path, checkpoint.options)
    assert model.get_base_model().lm_head.weight.any()


def test_regular_expressions_that_end_are_those_of_peft(tmp_path: Path, base: PreTrainedModel) -> None:
    config = {"r": 8, "rank_pattern": {r".*q_proj": 4}, "target_modules": r"model\.layers\.\d+\.self_attn\.q_proj"}
    model = load_peft(saved(tmp_path, base, **config))
    names = [name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    assert len(names) == 2
