from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from trainings import VARIANTS, VOCABULARY, job, random_row

from edgetune import methods
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.training import loop as training
from edgetune.training.checkpointing import checkpointed, layer_cost, layers_of, trained_layers
from edgetune.training.memory import PassPlan

SYSTEM = range(10, 22)
# Of methods whose defaults do not fit the tiny base.
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"target_r": 2, "init_r": 4},
    "alora": {"r": 4, "invocation_tokens": tuple(SYSTEM)},
    "last_layers": {"layers": 1},
    "oft": {"oft_block_size": 8},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix": {"num_virtual_tokens": 4, "init_tokens": (10, 11, 12)},
    "prompt": {"num_virtual_tokens": 4, "init_tokens": (10, 11, 12)},
}
WHOLE = PassPlan()
SPLIT = PassPlan(tokens=50, checkpointed=1, layers=2)
ROWS_ALONE = PassPlan(tokens=1, checkpointed=2, layers=2)


def rows(lengths: Sequence[int]) -> list[Example]:
    """Rows with a shared beginning, which activates alora; the last third of each is learned."""
    start = len(SYSTEM)
    return [random_row(n, start + length, SYSTEM, start + 2 * length // 3) for n, length in enumerate(lengths)]


def gradients(run: Any, passes: PassPlan, batch: Sequence[Example]) -> dict[str, torch.Tensor]:  # noqa: ANN401 - private
    """Those of one step, before they are cut."""
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        named = run.tuned.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    run.passes, run.state.step = passes, 0
    hook = run.optimizer.optimizer.register_step_pre_hook(keep)
    weights = run._weights()
    try:
        run.tuned.train()
        run._step(batch)
    finally:
        hook.remove()
        run._load_weights(weights)
    return found


# The others have the layers of lora.
@pytest.mark.parametrize("name", [name for name in methods.names() if name not in (*VARIANTS, "pissa")])
def test_split_and_checkpointed_passes_have_the_gradient_of_one_whole_pass(name: str, tmp_path: Path) -> None:
    base, batch = make_model("llama", VOCABULARY), rows([20, 9, 30, 14])
    run = training._Run(base, job(name, OPTIONS.get(name), max_grad_norm=1e9), tmp_path)
    run.objective.prepare(base)
    try:
        whole = gradients(run, WHOLE, batch)
        assert any(gradient.abs().max() > 0 for gradient in whole.values())
        for passes in (SPLIT, ROWS_ALONE):
            found = gradients(run, passes, batch)
            assert found.keys() == whole.keys()
            for key, gradient in whole.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()))
    finally:
        run.detach()


def test_checkpointed_layers_keep_their_input_and_run_again() -> None:
    base, batch = make_model("llama", VOCABULARY), NEXT_TOKEN.batch(rows([20, 9]))
    NEXT_TOKEN.prepare(base)
    base.train()
    layers, runs = layers_of(base), []
    hook = layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    run = partial(NEXT_TOKEN.loss, base, base, batch)
    kept = layer_cost(run, layers[:1])
    with checkpointed(layers[:1]):
        least = layer_cost(run, layers[:1])
        runs.clear()
        run().backward()
    hook.remove()
    assert least.kept <= 1.1 * least.input < 0.2 * kept.kept
    assert len(runs) == 2
    run().backward()
    assert trained_layers(layers) == 2
    layers[0].requires_grad_(requires_grad=False)
    assert trained_layers(layers) == 1


def test_an_error_in_a_measured_layer_leaves_gradients_as_they_were() -> None:
    base = make_model("llama", VOCABULARY)
    layers = layers_of(base)
    layers[0].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer_cost(lambda: base(torch.tensor([[1, 2]])), layers)
    assert torch.is_grad_enabled()
