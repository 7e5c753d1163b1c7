"""LoRA layers with rounded merged weights compute what the merged file has, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.adapters.shapes import Merged
from edgetune_export.base_file.merge import write_merged
from edgetune_export.parity import compare
from edgetune_runtime.engines.gguf.engine import GgufEngine
from trainings import QUIET, job, pass_gradients, random_lora, short_answer

from edgetune import bases
from edgetune.bases import Base
from edgetune.methods import Checkpoint
from edgetune.methods.common.peft import tuned_layers
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.shipping.verify import logits_of
from edgetune.training.checkpointing import layer_cost, layers_of
from edgetune.training.loop import train
from edgetune.training.rounding import rounded_layers

ROWS = [short_answer(number) for number in range(6)]
LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def base_in(wide_gguf: Callable[[int], Path], tmp_path: Path) -> Callable[[str], Base]:
    """`base_in(quantization)`: a tiny LLaMA whose rows are long enough for every type."""

    def make(quantization: str) -> Base:
        source, work = str(wide_gguf(256)), tmp_path / "base"
        return bases.resolve(
            source, folder=Path(), quantization=quantization, work=work, progress=QUIET, converter=None
        )

    return make


def tuned(base: Base, dtype: torch.dtype = torch.float32, **options: Any) -> Any:  # noqa: ANN401 - PEFT's
    """A random LoRA on the base, the same each time."""
    model = bases.load_torch(base, dtype)
    torch.manual_seed(0)
    return random_lora(model, std=0.02, target_modules="all-linear", **options)


def test_gradients_are_those_of_a_lora_on_weights_that_add_up_to_the_rounded_ones(
    base_in: Callable[[str], Base],
) -> None:
    base = base_in("q4_0")
    model = tuned(base)
    with rounded_layers(model, base.path):
        rounded = pass_gradients(model, ROWS)
        layers = dict(tuned_layers(model))
        weights = {name: layer.forward._weight.view_as(layer.base_layer.weight) for name, layer in layers.items()}
    assert not [name for name, layer in layers.items() if "forward" in vars(layer)]
    plain = pass_gradients(model, ROWS)
    assert abs(plain["loss"] - rounded["loss"]) > 1e-3
    with torch.no_grad():
        for name, layer in layers.items():
            layer.base_layer.weight.copy_(weights[name] - layer.get_delta_weight("default"))
    expected = pass_gradients(model, ROWS)
    assert rounded.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            rounded[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_dropout_acts_on_the_update_alone(base_in: Callable[[str], Base]) -> None:
    base = base_in("q4_0")
    model = tuned(base, lora_dropout=0.5)
    with rounded_layers(model, base.path):
        torch.manual_seed(1)
        first, second = pass_gradients(model, ROWS)["loss"], pass_gradients(model, ROWS)["loss"]
        assert first != second
        model.eval()
        assert pass_gradients(model, ROWS)["loss"] == pass_gradients(model, ROWS)["loss"]


def test_rounded_weights_are_no_memory_of_a_pass(base_in: Callable[[str], Base]) -> None:
    base = base_in("q4_0")
    model = tuned(base)
    layers, batch = layers_of(model), NEXT_TOKEN.batch(ROWS[:1])
    plain = layer_cost(lambda: NEXT_TOKEN.loss(model, model, batch), layers)
    with rounded_layers(model, base.path):
        rounded = layer_cost(lambda: NEXT_TOKEN.loss(model, model, batch), layers)
    assert rounded.kept < 1.2 * plain.kept


def test_a_base_in_bfloat16_is_rounded_as_one_in_float32(base_in: Callable[[str], Base]) -> None:
    base, weights = base_in("q4_0"), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tuned(base, dtype=dtype)
        with rounded_layers(model, base.path), torch.autocast("cpu", torch.bfloat16):
            pass_gradients(model, ROWS)
            weights.append([layer.forward._weight for _, layer in tuned_layers(model)])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


# Some linear modules of q4_k_m and q5_k_m are in q6_k.
@pytest.mark.parametrize("quantization", ["q4_0", "q4_1", "q4_k_m", "q5_k_m"])
def test_the_merged_file_says_what_training_computed(
    quantization: str, base_in: Callable[[str], Base], tmp_path: Path
) -> None:
    base = base_in(quantization)
    types = {tensor.type.name for name, tensor in base.header.tensors.items() if name.startswith("blk.")}
    assert ("q6_k" in types) == quantization.endswith("k_m")
    model = bases.load_torch(base, torch.float32)
    work = replace(job("lora", LORA, learning_rate=2e-2), rounds_to=base.path)
    result = train(model, work, tmp_path / "run", QUIET)
    assert result.val_loss < result.history[0].val_loss - 1
    checkpoint = Checkpoint("reply", tmp_path / "run" / "adapter", model, work.options)
    merged = work.method.fold(checkpoint, Merged.shape)
    assert isinstance(merged, Merged)
    on_grid, nearest = tmp_path / "grid.gguf", tmp_path / "nearest.gguf"
    write_merged(replace(merged, on_grid=True), base.path, on_grid)
    write_merged(merged, base.path, nearest)
    assert on_grid.stat().st_size == base.path.stat().st_size
    with work.method.loaded(checkpoint) as trained, rounded_layers(trained, base.path):
        kept, lost = kl_of(trained, on_grid), kl_of(trained, nearest)
    # Merged as others are, it loses part of what was trained.
    assert kept < 1e-3 and lost > 3 * kept


def kl_of(trained: Any, file: Path) -> float:  # noqa: ANN401 - PEFT's
    """The mean KL of the answers' logits in llama.cpp."""
    with closing(GgufEngine(file, context_length=64)) as engine:
        return compare(logits_of(trained), engine, [list(row.tokens) for row in ROWS]).kl
