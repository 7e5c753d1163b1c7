from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edgetune_export.architectures import known
from edgetune_export.architectures.shape import BaseShape, SizedModule
from edgetune_runtime.errors import CancelledError, UsageError
from tiny import SAME_MODULES, make_model
from trainings import Listening, Stopping, job
from transformers import LlamaConfig, LlamaForCausalLM

from edgetune import methods
from edgetune.bases import Base
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import NEXT_TOKEN
from edgetune.training.checkpointing import LayerCost, layer_cost, layers_of
from edgetune.training.loop import train
from edgetune.training.memory import (
    MOST_TOKENS,
    PassCost,
    measured,
    plan_passes,
    predicted,
    saved_states_mb,
    training_need,
)
from edgetune.training.pass_sizes import pass_cost

# 10 layers that keep 0.1 MB per token together, of which their inputs are 0.01 MB; the loss takes 50 MB.
COST = PassCost(10, 1e5, 1e3, 0.0, 5e7)
WIDTHS = {"q": (192, 192), "k": (192, 64), "v": (192, 64), "o": (192, 192)}
WIDTHS |= {"gate": (192, 512), "up": (192, 512), "down": (512, 192)}
PRODUCTS = {**dict.fromkeys("qkv", "qkv"), "gate": "gate_up", "up": "gate_up"}
SHAPE = BaseShape(
    architecture=known()["llama"],
    modules=tuple(
        SizedModule(f"model.layers.{layer}.{name}_proj", f"{layer}.{PRODUCTS.get(name, name)}", *widths, layer)
        for layer in range(2)
        for name, widths in WIDTHS.items()
    ),
    output_layer=SizedModule("lm_head", "lm_head", 192, 384),
    intermediate=512,
    queries=192,
    keys=64,
    norms=384,
    kv_values_per_token=2 * 2 * 64,
    parameters_by_layer=(450_000, 450_000),
    parameters=1_000_000,
)


def plan(room_mb: float, limit_mb: float | None = None, longest_row: int = 500) -> Any:  # noqa: ANN401 - short
    return plan_passes(
        COST, longest_row=longest_row, batch_size=16, used_mb=1000, limit_mb=limit_mb, room_mb=room_mb, name="reply"
    )


def test_passes_are_whole_where_memory_is_plenty() -> None:
    found = plan(room_mb=20_000)
    assert (found.tokens, found.validation_tokens, found.checkpointed) == (MOST_TOKENS, MOST_TOKENS, 0)
    assert found.keeps_freed
    assert str(found) == "forward passes of at most 4,096 tokens"


def test_passes_shrink_to_what_is_free_and_to_the_limit() -> None:
    for found in (plan(room_mb=200), plan(room_mb=20_000, limit_mb=1200)):
        assert 500 <= found.tokens < MOST_TOKENS
        assert (found.checkpointed, found.keeps_freed) == (0, False)
        assert found.mb == pytest.approx(200, rel=0.01)
    assert plan(room_mb=200, limit_mb=9000) == plan(room_mb=200)


def test_layers_are_checkpointed_only_as_far_as_the_longest_row_needs() -> None:
    plans = [plan(room_mb) for room_mb in (120, 100, 80, 72)]
    counts = [found.checkpointed for found in plans]
    assert counts == sorted(counts)
    assert 0 == counts[0] < counts[1] < counts[-1] <= 9
    assert all(found.tokens >= 500 for found in plans)
    assert str(plans[1]).endswith(f"tokens, activation checkpointing in {counts[1]} of 10 layers")


def test_a_limit_that_nothing_fits_names_the_least_that_would_do() -> None:
    with pytest.raises(
        UsageError, match=r"training.memory_mb is 1,010, but training reply needs at least 1,0\d\d;"
    ) as e:
        plan(room_mb=20_000, limit_mb=1010)
    least = int(str(e.value).split("set it to ")[1].split()[0])
    assert plan(room_mb=20_000, limit_mb=least).checkpointed == 9
    with pytest.raises(UsageError):
        plan(room_mb=20_000, limit_mb=least - 2)


def test_tokens_before_the_rows_take_their_part_of_a_pass() -> None:
    after = replace(COST, before=300)
    assert after.pass_mb(500) == COST.pass_mb(800)
    assert after.tokens(120) == COST.tokens(120) - 300
    assert after.validation_tokens(120) == COST.validation_tokens(120) - 300
    base, rows = make_model("llama", 384), job("lora").train
    cost = pass_cost(rows, base, lambda row: base(torch.tensor([row.tokens])).logits, before=300, vocabulary=384)
    assert cost is not None and cost.before == 300


def test_without_a_limit_the_smallest_passes_are_tried_where_memory_is_short() -> None:
    found = plan(room_mb=10)
    assert (found.tokens, found.checkpointed) == (500, 9)


def test_memory_per_token_and_constant_memory_follow_from_two_lengths() -> None:
    cost = measured((10, LayerCost(1300, 40)), (100, LayerCost(4000, 400)), layers=3, vocabulary=384)
    assert (cost.per_token, cost.constant, cost.input_per_token) == (90, 3000, 4)
    alike = measured((10, LayerCost(1300, 40)), (10, LayerCost(1300, 40)), layers=3, vocabulary=384)
    assert (alike.per_token, alike.constant) == (390, 0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"target_modules": ("q_proj", "v_proj")}),
        ("lora", {"target_modules": ("down_proj",), "r": 4}),
        ("full", {}),
        ("prefix", {}),
        ("bottleneck", {}),
    ],
)
def test_what_a_pass_keeps_is_predicted_by_the_shape(method: str, options: dict[str, Any]) -> None:
    config = LlamaConfig(
        vocab_size=384, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base, kind = LlamaForCausalLM(config), methods.load(method)
    chosen = kind.options.model_validate(options)
    tuned = kind.attach(base, chosen, 1)
    NEXT_TOKEN.prepare(base)
    tuned.train()
    row = Example(tuple(range(100)), (False,) * 50 + (True,) * 50, 50)
    batch = NEXT_TOKEN.batch([row])
    found = layer_cost(lambda: NEXT_TOKEN.loss(tuned, tuned, batch), layers_of(base))
    told = predicted(kind, chosen, kind.trained(SHAPE, chosen), "fp32")
    assert found.kept / 100 == pytest.approx(told.per_token / 2, rel=0.15)
    assert found.input / 100 == told.input_per_token


def test_the_shape_of_a_base_is_read_from_its_header(tiny_base: Callable[[str], Base]) -> None:
    shape = BaseShape.of_header(tiny_base("gemma3").header)
    assert (shape.layers, shape.hidden, shape.intermediate, shape.queries, shape.keys) == (6, 64, 128, 64, 32)
    assert shape.norms == 4 * 64 + 64 + 32
    model = make_model("gemma3", shape.vocabulary)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


@pytest.mark.parametrize("arch", SAME_MODULES)
def test_the_linear_modules_are_those_of_the_model(arch: str, tiny_base: Callable[[str], Base]) -> None:
    shape = BaseShape.of_header(tiny_base(arch).header)
    named = make_model(arch, shape.vocabulary).named_modules()
    linear = {
        name: (module.in_features, module.out_features)
        for name, module in named
        if hasattr(module, "in_features") and name not in known()[arch].fixed_modules
    }
    assert {m.name: (m.columns, m.rows) for m in (*shape.modules, shape.output_layer)} == linear


def test_a_need_grows_with_rows_and_with_what_is_trained() -> None:
    def need(method: str, row: int, batch: int) -> tuple[float, float]:
        kind = methods.load(method)
        trained = kind.trained(SHAPE, kind.options())
        found = training_need(kind, kind.options(), trained, longest_row=row, batch_tokens=batch, precision="fp32")
        return found.min_mb, found.max_mb

    short, long, full = need("lora", 100, 800), need("lora", 500, 4000), need("full", 100, 800)
    assert short < long
    assert short < full
    assert all(least < planned for least, planned in (short, long, full))


def test_int8_takes_two_bytes_more_for_each_weight_of_the_layers() -> None:
    kind, options = methods.load("lora"), methods.load("lora").options()
    trained = kind.trained(SHAPE, options)
    sizes = {"longest_row": 100, "batch_tokens": 800}
    fp32, int8 = (training_need(kind, options, trained, **sizes, precision=p) for p in ("fp32", "int8"))
    weights = 2 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    assert int8.min_mb - fp32.min_mb == pytest.approx(2 * weights / 1e6)
    assert int8.max_mb - fp32.max_mb == pytest.approx(2 * weights / 1e6)


def test_a_saved_state_has_the_size_that_is_predicted(tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        train(make_model("llama", 384), job("lora", {"r": 64}), tmp_path, Stopping(5))
    (file,) = tmp_path.glob("state.pt")
    trained = sum(values.numel() for values in torch.load(file, weights_only=True)["weights"].values())
    # Beside it the next one is written.
    assert 2 * file.stat().st_size == pytest.approx(saved_states_mb(trained) * 1e6, rel=0.05)


def test_a_memory_limit_is_reported_and_changes_no_loss(tmp_path: Path) -> None:
    base = make_model("llama", 384)
    with pytest.raises(UsageError, match=r"training.memory_mb is 5, but training reply needs at least") as error:
        train(base, job("lora", max_steps=1, memory_mb=5), tmp_path, Listening())
    assert not any(module._forward_hooks for module in base.modules())
    least = int(str(error.value).split("set it to ")[1].split()[0])
    progress = Listening()
    limited = train(base, job("lora", max_steps=2, memory_mb=least + 500), tmp_path / "limited", progress)
    assert progress.lines[0].startswith("training reply: forward passes of at most")
    assert progress.lines[0].endswith(f"memory limit {least + 500:,} MB")
    free = train(base, job("lora", max_steps=2), tmp_path / "free", Listening())
    assert limited.val_loss == pytest.approx(free.val_loss, rel=1e-5)
