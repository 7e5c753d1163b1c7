from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny import make_model
from torch.nn.functional import cross_entropy
from trainings import VOCABULARY, gradients, random_row

from edgetune import methods
from edgetune.objectives import chunks
from edgetune.objectives.example import Example
from edgetune.objectives.next_token import NEXT_TOKEN, packed_logits


def batch() -> Any:  # noqa: ANN401 - of an objective
    return NEXT_TOKEN.batch([random_row(seed, 30, (), 10) for seed in range(3)])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "granite", "gemma4"])
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"r": 4}), ("full", {}), ("lora", {"target_modules": ("q_proj", "lm_head")})]
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_a_loss_by_chunks_has_the_value_and_gradients_of_one_on_all_logits(
    arch: str, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kind = make_model(arch, VOCABULARY), methods.load(method)
    tuned = kind.attach(base, kind.options.model_validate(options), 1)
    NEXT_TOKEN.prepare(base)
    packed = batch()

    whole = cross_entropy(packed_logits(tuned, packed).float(), packed.targets, reduction="sum")
    wanted = gradients(tuned, whole)
    # 60 predictions in chunks of 7.
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 7 * VOCABULARY)
    loss = NEXT_TOKEN.loss(tuned, tuned, packed)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    found = gradients(tuned, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    with torch.no_grad():
        assert NEXT_TOKEN.loss(tuned, tuned, packed).item() == pytest.approx(whole.item(), rel=1e-6)
    assert packed_logits(tuned, packed).shape == (60, VOCABULARY)


def test_the_loss_of_a_row_is_multiplied_by_its_weight() -> None:
    base = make_model("llama", VOCABULARY)
    NEXT_TOKEN.prepare(base)
    rows = [Example(tuple(range(start, start + 12)), (False,) * 4 + (True,) * 8, 4) for start in (5, 40)]
    with torch.no_grad():
        first, second = (NEXT_TOKEN.loss(base, base, NEXT_TOKEN.batch([row])).item() for row in rows)
        weighted_rows = [replace(rows[0], weight=0.25), rows[1]]
        weighted = NEXT_TOKEN.batch(weighted_rows)
        assert NEXT_TOKEN.loss(base, base, weighted).item() == pytest.approx(first / 4 + second, rel=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [NEXT_TOKEN.loss(base, base, NEXT_TOKEN.batch([row])) for row in (rows[0], weighted_rows[0])]
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item() / 4, rel=1e-6)


def test_logits_are_made_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = make_model("llama", VOCABULARY), []
    NEXT_TOKEN.prepare(base)
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 25 * VOCABULARY)

    def loss_of(logits: torch.Tensor, part: slice) -> torch.Tensor:
        rows.append((len(logits), part.start))
        return logits.sum()

    chunks.summed_loss(partial(packed_logits, base, batch()), base, loss_of)
    assert rows == [(25, 0), (25, 25), (10, 50)]
