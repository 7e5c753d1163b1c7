"""Layers in int8 give about the losses and gradients of float32 while they train, and the same ones in validation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_runtime.errors import UsageError
from tiny import ARCHITECTURES, FEW, make_encoder, make_model
from torch.nn.functional import cosine_similarity
from trainings import QUIET, VOCABULARY, answer, job, learn, pass_gradients, stopped_and_resumed

from edgetune import methods
from edgetune.building.encoder.objective import Classify, Labelled
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.training.checkpointing import checkpointed, layers_of
from edgetune.training.fused import fused
from edgetune.training.int8 import PackedLinear, in_int8
from edgetune.training.loop import train

ROWS = [answer(number) for number in range(12)]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# The largest sums that there are: of ones, of rows of either sign and of weights of either sign.
EXTREMES = """
import torch
from edgetune.training.int8 import PackedLinear
layer = torch.nn.Linear(1024, 8, bias=False).requires_grad_(False)
layer.weight.fill_(1.0)[1::2] = -1.0
packed = PackedLinear(layer)
for side, product in ((1024, packed.outputs), (8, packed.inputs)):
    rows = torch.ones(6, side)
    rows[1::2] = -1.0
    exact = layer(rows) if side == 1024 else rows @ layer.weight
    torch.testing.assert_close(product(rows), exact, rtol=1e-5, atol=1e-3)
"""


def _tuned(arch: str, method: str = "lora", options: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - PEFT's
    base, kind = make_model(arch, VOCABULARY), methods.load(method)
    torch.manual_seed(0)
    model: Any = kind.attach(base, kind.options.model_validate(options or {"r": 4}), 10)
    NEXT_TOKEN.prepare(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def _loss(model: Any) -> torch.Tensor:  # noqa: ANN401 - as above
    return NEXT_TOKEN.loss(model, model, NEXT_TOKEN.batch(ROWS))


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(cosine_similarity(first.flatten(), second.flatten(), dim=0))


def test_products_are_near_those_of_float32() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40).requires_grad_(False)
    packed, rows, grad = PackedLinear(layer), torch.randn(50, 96), torch.randn(50, 40)
    # One row of noise beside another that is much larger.
    rows[3] *= 1000
    for found, exact in ((packed.outputs(rows), layer(rows)), (packed.inputs(grad), grad @ layer.weight)):
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert 0 < error.max() < 0.02


def test_the_largest_sums_do_not_saturate_on_avx2() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXTREMES], env={**os.environ, **AVX2}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rows_of_zeros_give_zeros_and_nan_stays_nan() -> None:
    layer = torch.nn.Linear(8, 4, bias=False).requires_grad_(False)
    layer.weight[1] = 0.0
    rows = torch.ones(3, 8)
    rows[1], rows[2, 5] = 0.0, torch.nan
    found = PackedLinear(layer).outputs(rows)
    assert found[0].isfinite().all() and found[0, 1] == 0
    assert (found[1] == 0).all()
    assert found[2].isnan().all()


@pytest.mark.parametrize(
    ("arch", "method"), [*((arch, "lora") for arch in ARCHITECTURES), *((arch, "dora") for arch in FEW)]
)
def test_losses_and_gradients_are_near_those_of_float32(arch: str, method: str) -> None:
    model = _tuned(arch, method)
    with fused(model):
        expected = pass_gradients(model, ROWS)
    with fused(model, int8=True):
        found = pass_gradients(model, ROWS)
    assert found.keys() == expected.keys()
    assert found["loss"] != expected["loss"]
    assert found["loss"] == pytest.approx(float(expected["loss"]), rel=0.005)
    # The norm after the inputs of the layers of a Gemma 4 makes small products large, with their errors; a Gemma 3 with
    # random weights has sharp attention, which does the same.
    least = 0.95 if arch in ("gemma3", "gemma4") else 0.99
    assert all(_cosine(found[name], gradient) > least for name, gradient in expected.items())


def test_a_base_without_adapters_in_its_layers_computes_in_int8_too() -> None:
    model = _tuned("llama", "prompt", {"num_virtual_tokens": 4})
    exact = pass_gradients(model, ROWS)
    with fused(model, int8=True):
        found = pass_gradients(model, ROWS)
    assert found["loss"] != exact["loss"]
    assert all(_cosine(found[name], gradient) > 0.99 for name, gradient in exact.items())


@pytest.mark.parametrize("arch", ["llama", "gemma4"])
def test_checkpointed_layers_have_the_same_gradients(arch: str) -> None:
    model = _tuned(arch)
    with fused(model, int8=True):
        whole = pass_gradients(model, ROWS)
        with checkpointed(layers_of(model)):
            again = pass_gradients(model, ROWS)
    assert all(torch.equal(whole[name], gradient) for name, gradient in again.items())


def test_validation_is_that_of_float32() -> None:
    model = _tuned("llama").eval()
    with torch.no_grad():
        with fused(model):
            expected = _loss(model)
        with fused(model, int8=True):
            assert torch.equal(_loss(model), expected)


def test_only_frozen_linear_layers_within_the_layers_are_packed() -> None:
    model = _tuned("qwen2", options={"r": 4, "target_modules": ["q_proj"]})
    with in_int8(model) as packed:
        names = {name for name, module in model.named_modules() if module in packed}
        assert {name.rpartition(".")[2] for name in names} == {
            "base_layer", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip
        assert len(names) == 2 * 7
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_layer_keeps_its_forward_after_an_error() -> None:
    model = _tuned("llama")
    with pytest.raises(KeyboardInterrupt), fused(model, int8=True):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_known_layers_is_refused() -> None:
    with (
        pytest.raises(UsageError, match=r"no frozen linear layers; set it to fp32$"),
        fused(torch.nn.Linear(4, 4).requires_grad_(False), int8=True),
    ):
        pass


def test_a_training_in_int8_learns_and_is_reproducible(tmp_path: Path) -> None:
    base = make_model("llama", VOCABULARY)
    work = job("lora", {"r": 4}, precision="int8", max_steps=20, learning_rate=1e-2)
    result = learn(base, work, tmp_path / "first")
    assert result.val_loss < 0.8 * result.history[0].val_loss
    told = json.loads((tmp_path / "first/result.json").read_text(encoding="utf-8"))
    assert told["precision"] == "int8"
    again = stopped_and_resumed(base, work, tmp_path / "second", 12)
    assert again.history == result.history


def test_a_step_in_int8_has_about_the_loss_of_one_in_float32(tmp_path: Path) -> None:
    base = make_model("llama", VOCABULARY)
    found, exact = (
        train(base, job("lora", precision=name, max_steps=1, evals=1), tmp_path / name, QUIET).train_loss
        for name in ("int8", "fp32")
    )
    assert found == pytest.approx(exact, rel=0.005) and found != exact


def test_an_encoder_trains_in_int8(tmp_path: Path) -> None:
    rows = [Labelled((2, 5 + number % 3, 8 + number, 3), number % 3) for number in range(12)]
    work = job("lora", {"r": 4}, precision="int8", max_steps=20, learning_rate=1e-2)
    changes = {"train": rows, "validation": rows, "objective": Classify(64, 3)}
    result = learn(make_encoder("bert", 40), type(work)(**{**vars(work), **changes}), tmp_path)
    assert result.precision == "int8"
    assert result.val_loss < 0.5 * result.history[0].val_loss
