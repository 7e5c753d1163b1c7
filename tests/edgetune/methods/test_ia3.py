from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_export.adapters.shapes import Merged, Tensors
from peft import IA3Config, get_peft_model
from tiny import make_model
from torch.nn.functional import linear
from trainings import VOCABULARY, answer, job, learn, logits_of
from transformers import PreTrainedModel

from edgetune import methods
from edgetune.methods import Checkpoint
from edgetune.methods.common.base import trainable

IA3 = methods.load("ia3")
TOKENS = answer(5).tokens
# Modules of Qwen 2 with a bias, scaled on both sides.
BOTH_SIDES = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["q_proj", "down_proj"]}


def random_checkpoint(arch: str, folder: Path, options: dict[str, Any] | None = None, scale: float = 1.0) -> Checkpoint:
    """Random factors around 1, saved as a training saves them."""
    chosen = IA3.options.model_validate(options or {})
    model = IA3.attach(make_model(arch, VOCABULARY), chosen, 10)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, factors in trainable(model):
            factors.add_(torch.randn_like(factors) / 4)
    IA3.save(model, folder)
    IA3.detach(model)
    return Checkpoint("reply", folder, make_model(arch, VOCABULARY).eval(), chosen, scale)


def scaled(base: PreTrainedModel, folded: Tensors, scale: float) -> torch.Tensor:
    """Logits of the base with the factors put on its modules by hand."""
    for name, scaling in folded.scalings.items():
        module = base.get_submodule(name)
        factors = 1 + scale * (torch.from_numpy(scaling.factors) - 1)
        if scaling.side == "output":
            module.register_forward_hook(lambda _m, _a, out, factors=factors: out * factors)
        else:
            module.register_forward_pre_hook(lambda _m, args, factors=factors: (args[0] * factors,))
    return logits_of(base, TOKENS)


# One with biases, and one whose blocks have norms at their ends.
@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
@pytest.mark.parametrize("options", [{}, BOTH_SIDES, {"target_modules": "all-linear"}])
def test_both_shapes_compute_what_was_trained(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    scale = 0.5
    checkpoint = random_checkpoint(arch, tmp_path, options, scale)
    plain = logits_of(checkpoint.base, TOKENS)
    with IA3.loaded(checkpoint) as model:
        trained = logits_of(model, TOKENS)
    assert (trained - plain).abs().max() > 0.1
    tensors, merged = IA3.fold(checkpoint, "tensors"), IA3.fold(checkpoint, "merged")
    assert isinstance(tensors, Tensors)
    assert isinstance(merged, Merged)
    assert torch.equal(logits_of(checkpoint.base, TOKENS), plain)
    torch.testing.assert_close(scaled(make_model(arch, VOCABULARY), tensors, scale), trained)
    other = make_model(arch, VOCABULARY)
    values = {name: torch.from_numpy(value()) for name, value in merged.parameters.items()}
    assert not other.load_state_dict(values, strict=False).unexpected_keys
    torch.testing.assert_close(logits_of(other, TOKENS), trained)


def test_a_bias_is_merged_where_outputs_are_scaled(tmp_path: Path) -> None:
    checkpoint = random_checkpoint("qwen2", tmp_path, BOTH_SIDES)
    merged = IA3.fold(checkpoint, "merged")
    assert isinstance(merged, Merged)
    biases = {name for name in merged.parameters if name.endswith(".bias")}
    assert biases == {f"model.layers.{layer}.self_attn.v_proj.bias" for layer in (0, 1)}
    tensors = IA3.fold(checkpoint, "tensors")
    assert isinstance(tensors, Tensors)
    name = "model.layers.0.self_attn.v_proj"
    module, inputs = checkpoint.base.get_submodule(name), torch.randn(3, 64)
    by_factors = module(inputs).detach().numpy() * tensors.scalings[name].factors
    weight, bias = (torch.from_numpy(merged.parameters[f"{name}.{part}"]()) for part in ("weight", "bias"))
    np.testing.assert_allclose(linear(inputs, weight, bias).numpy(), by_factors, rtol=1e-4, atol=1e-5)


def test_the_factors_are_pefts() -> None:
    model = IA3.attach(make_model("llama", VOCABULARY), IA3.options(), 10)
    theirs = get_peft_model(make_model("llama", VOCABULARY), IA3Config(task_type="CAUSAL_LM"))
    shapes = {name: (p.shape, p.dtype) for name, p in trainable(model)}
    assert shapes == {name: (p.shape, p.dtype) for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(shapes) == 6
    (group,) = IA3.parameter_groups(model, IA3.options(), 1e-3)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (pytest.approx(1e-2), 0, 6)


def test_targets_alone_may_be_chosen() -> None:
    model = IA3.attach(make_model("llama", VOCABULARY), IA3.options.model_validate({"target_modules": "v_proj"}), 10)
    assert [p.numel() for _, p in trainable(model)] == [32, 32]


def test_the_default_learning_rate_learns(tmp_path: Path) -> None:
    base, work = make_model("llama", VOCABULARY), job("ia3", max_steps=60)
    result = learn(base, work, tmp_path)
    assert work.training.learning_rate == 1e-3
    assert result.val_loss < 0.93 * result.history[0].val_loss
    assert result.trainable_parameters == 2 * (32 + 32 + 128)
