from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetune_export.adapters.shapes import Bottleneck, Tensors
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from tiny import FEW, make_encoder, make_model
from torch.nn import functional
from trainings import VOCABULARY, answer, job, learn, logits_of, randomize, stopped_and_resumed

from edgetune import methods
from edgetune.methods import Checkpoint
from edgetune.methods.common.base import trainable
from edgetune.objectives.packing import pack, take_packed_rows

BOTTLENECK = methods.load("bottleneck")
TOKENS = answer(5).tokens
KINDS: list[dict[str, Any]] = [
    {"kind": "houlsby", "bottleneck_size": 5, "non_linearity": "silu"},
    {"kind": "pfeiffer", "reduction_factor": 8},
    {"kind": "parallel", "bottleneck_size": 4, "non_linearity": "gelu", "scaling": 3.0},
]


def attach(arch: str, options: dict[str, Any]) -> Any:  # noqa: ANN401 - a module with parts of its own
    """A tiny base with random bottlenecks."""
    model = BOTTLENECK.attach(make_model(arch, VOCABULARY).eval(), BOTTLENECK.options.model_validate(options), 10)
    randomize(model)
    return model


def checkpoint_of(model: Any, folder: Path, arch: str = "llama") -> Checkpoint:  # noqa: ANN401
    BOTTLENECK.save(model, folder)
    return Checkpoint("reply", folder, make_model(arch, VOCABULARY).eval(), BOTTLENECK.options())


def by_hand(base: Any, bottlenecks: dict[str, Bottleneck], scale: float) -> torch.Tensor:  # noqa: ANN401
    """Logits of the base with the folded numbers computed in float64 beside its blocks."""
    acts = {"relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu}

    def hook_of(item: Bottleneck) -> Any:  # noqa: ANN401
        down, down_bias, up, up_bias = (
            torch.from_numpy(array).double() for array in (item.down, item.down_bias, item.up, item.up_bias)
        )

        def hook(_block: Any, inputs: Any, output: Any) -> Any:  # noqa: ANN401
            out = output[0] if isinstance(output, tuple) else output
            x = (out if item.reads == "output" else inputs[0]).double()
            hidden = acts[item.activation](x @ down.T + down_bias)
            out = out + (scale * (hidden @ up.T + up_bias)).float()
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    handles = [base.get_submodule(name).register_forward_hook(hook_of(item)) for name, item in bottlenecks.items()]
    logits = logits_of(base, TOKENS)
    for handle in handles:
        handle.remove()
    return logits


def assert_refused(error: type[EdgetuneError], problem: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(error, match=problem):
        BOTTLENECK.fold(checkpoint, "tensors")
    with pytest.raises(error, match=problem), BOTTLENECK.loaded(checkpoint):
        pass


@pytest.mark.parametrize("arch", FEW)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_saved_folder_and_folded_adapter_compute_what_was_trained(
    arch: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = attach(arch, options)
    trained = logits_of(model, TOKENS)
    checkpoint = checkpoint_of(model, tmp_path, arch)
    plain = logits_of(checkpoint.base, TOKENS)
    assert (trained - plain).abs().max() > 0.1
    folded = BOTTLENECK.fold(checkpoint, "tensors")
    assert isinstance(folded, Tensors)
    for scale in (1.0, 0.5):
        with BOTTLENECK.loaded(replace(checkpoint, scale=scale)) as loaded:
            found = logits_of(loaded, TOKENS)
        expected = by_hand(checkpoint.base, dict(folded.bottlenecks), scale)
        torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found, trained, rtol=1e-4, atol=1e-4) == (scale == 1.0)
    assert torch.equal(logits_of(checkpoint.base, TOKENS), plain)


@pytest.mark.parametrize(
    ("options", "blocks", "reads", "size"),
    [
        (KINDS[0], {"self_attn", "mlp"}, {"output"}, 5),
        (KINDS[1], {"mlp"}, {"output"}, 8),
        (KINDS[2], {"mlp"}, {"input"}, 4),
    ],
)
def test_each_kind_has_its_places(
    options: dict[str, Any], blocks: set[str], reads: set[str], size: int, tmp_path: Path
) -> None:
    model = attach("llama", options)
    folded = BOTTLENECK.fold(checkpoint_of(model, tmp_path), "tensors")
    assert isinstance(folded, Tensors)
    assert set(folded.bottlenecks) == {f"model.layers.{layer}.{block}" for layer in (0, 1) for block in blocks}
    for item in folded.bottlenecks.values():
        assert (item.down.shape, item.down_bias.shape) == ((size, 64), (size,))
        assert (item.up.shape, item.up_bias.shape) == ((64, size), (64,))
        assert item.reads in reads
    up = next(p for name, p in trainable(model) if name.endswith("up.weight"))
    first = folded.bottlenecks[model.blocks[0]]
    np.testing.assert_allclose(first.up, up.detach().numpy() * options.get("scaling", 1.0), rtol=1e-6)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_a_new_adapter_changes_nothing_and_leaves_nothing(options: dict[str, Any]) -> None:
    base = make_model("llama", VOCABULARY).eval()
    plain, names = logits_of(base, TOKENS), list(base.state_dict())
    model = BOTTLENECK.attach(base, BOTTLENECK.options.model_validate(options), 10)
    assert torch.equal(logits_of(model, TOKENS), plain)
    assert {p.dtype for _, p in trainable(model)} == {torch.float32}
    assert {name.partition(".")[0] for name, _ in trainable(model)} == {"parts"}
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.fill_(1.0)
    assert not torch.equal(logits_of(base, TOKENS), plain)
    BOTTLENECK.detach(model)
    assert torch.equal(logits_of(base, TOKENS), plain)
    assert list(base.state_dict()) == names


def test_packed_rows_see_what_single_rows_see() -> None:
    model = attach("llama", KINDS[0])
    rows = [answer(number) for number in range(3)]
    alone = torch.cat([logits_of(model, row.tokens)[row.prompt_length - 1 : -1] for row in rows])
    packed = pack(rows)
    take_packed_rows(model.base)
    with torch.no_grad():
        together = model(
            input_ids=packed.tokens,
            position_ids=packed.positions,
            logits_to_keep=packed.predictors,
            packed=packed,
            use_cache=False,
        ).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_training_learns_and_a_stopped_one_resumes(tmp_path: Path) -> None:
    base, work = make_model("llama", VOCABULARY), job("bottleneck", KINDS[0], max_steps=40, learning_rate=1e-2)
    result = learn(base, work, tmp_path / "whole")
    assert result.val_loss < 0.75 * result.history[0].val_loss
    assert stopped_and_resumed(base, work, tmp_path / "resumed", 21).history == result.history


def test_a_base_without_such_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="BertModel has no mlp in its layers for a bottleneck; use another"):
        BOTTLENECK.attach(make_encoder("bert", 32), BOTTLENECK.options(), 10)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(attach("llama", KINDS[0]), tmp_path)
    small = Checkpoint("reply", tmp_path, make_model("llama", VOCABULARY, 32), BOTTLENECK.options())
    assert_refused(IncompatibleError, "has a bottleneck at model.layers.0.mlp that does not fit the base", small)
    (tmp_path / "bottlenecks.json").write_text(json.dumps({"kind": "pfeiffer"}), encoding="utf-8")
    assert_refused(VerificationError, "is damaged: .*self_attn", checkpoint)
    (tmp_path / "bottlenecks.safetensors").write_bytes(b"damaged")
    assert_refused(VerificationError, "is damaged", checkpoint)
    (tmp_path / "bottlenecks.json").unlink()
    assert_refused(NotFoundError, "is not a bottleneck adapter", checkpoint)
