"""PEFT folders from elsewhere are checked before PEFT reads them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.adapters import patterns
from edgetune_export.adapters.fold import CONFIG_NAME, WEIGHTS_NAME
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, VerificationError
from safetensors.torch import load_file
from tiny import make_model
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.methods.common.base import Checkpoint
from edgetune.methods.common.peft import load_peft

# Takes exponential time on a name such as model.layers.0.self_attn.q_proj.
ENDLESS = r"(\w|.)*!"


@pytest.fixture
def base() -> PreTrainedModel:
    return make_model("llama", 384)


def saved(folder: Path, base: PreTrainedModel, method: str = "loha", **config: object) -> Checkpoint:
    """A checkpoint of a method as PEFT saves it, with changes of its config."""
    kind: Any = methods.load(method)
    options = kind.options.model_validate({"r": 4, "target_modules": ["q_proj"]})
    model = kind.attach(base, options, 10)
    kind.save(model, folder)
    kind.detach(model)
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return Checkpoint(method, folder, base, options)


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
    message = "has init_lora_weights: pissa, which changes the base; save it again with"
    refused(saved(tmp_path, base, "dora", init_lora_weights="pissa"), IncompatibleError, message)
    assert all(torch.equal(values, before[name]) for name, values in base.state_dict().items())


def test_regular_expressions_that_end_are_those_of_peft(tmp_path: Path, base: PreTrainedModel) -> None:
    config = {"r": 8, "rank_pattern": {r".*q_proj": 4}, "target_modules": r"model\.layers\.\d+\.self_attn\.q_proj"}
    model = load_peft(saved(tmp_path, base, **config))
    names = [name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    assert len(names) == 2
