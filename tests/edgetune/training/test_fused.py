"""The fused layers give the losses and gradients of PEFT's and transformers' own, and leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from tiny import ARCHITECTURES, make_model
from trainings import VOCABULARY, answer, pass_gradients, random_lora

from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.training.fused import fused

ROWS = [answer(number) for number in range(6)]


def _tuned(arch: str, **options: Any) -> Any:  # noqa: ANN401 - PEFT's
    return random_lora(make_model(arch, VOCABULARY), **options)


def _fused_modules(model: torch.nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "out_proj", "down_proj", "w2"]], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_own_layers(arch: str, targets: Any) -> None:  # noqa: ANN401
    model = _tuned(arch, target_modules=targets)
    expected = pass_gradients(model, ROWS)
    with fused(model):
        changed = set(_fused_modules(model))
        found = pass_gradients(model, ROWS)
    assert "Linear" in changed
    assert any(name.endswith("RMSNorm") for name in changed)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_no_module_keeps_its_fused_forward() -> None:
    model = _tuned("llama", target_modules="all-linear")
    with pytest.raises(KeyboardInterrupt), fused(model):
        raise KeyboardInterrupt
    assert not _fused_modules(model)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_layers_that_compute_more_than_a_plain_lora_keep_their_forward(options: dict[str, Any]) -> None:
    model = _tuned("qwen2", target_modules=["q_proj"], **options)
    with fused(model):
        assert "Linear" not in _fused_modules(model)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_on_a_base_in_bf16_are_as_near_to_exact_ones_as_those_of_the_own_layers(arch: str) -> None:
    model = _tuned(arch, target_modules="all-linear")
    of_base = [p for p in model.parameters() if not p.requires_grad]
    for parameter in of_base:
        parameter.data = parameter.data.to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    expected = torch.cat([gradient.flatten() for gradient in pass_gradients(exact, ROWS).values()])

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
            found = torch.cat([gradient.float().flatten() for gradient in pass_gradients(model, ROWS).values()])
        return float((found - expected).norm() / expected.norm())

    own = error()
    with fused(model):
        assert "Linear" in _fused_modules(model)
        assert 0 < error() < max(1.2 * own, 0.01)


def test_layers_in_half_precision_keep_their_forward() -> None:
    model = _tuned("llama", target_modules="all-linear").to(torch.float16)
    with fused(model):
        assert not _fused_modules(model)


def test_a_disabled_adapter_does_nothing() -> None:
    model = _tuned("llama", target_modules="all-linear")
    tokens = torch.tensor([answer(0).tokens])
    with model.disable_adapter():
        expected = model(input_ids=tokens, use_cache=False, packed=NEXT_TOKEN.batch([answer(0)])).logits
        with fused(model):
            found = model(input_ids=tokens, use_cache=False, packed=NEXT_TOKEN.batch([answer(0)])).logits
    torch.testing.assert_close(found, expected)
