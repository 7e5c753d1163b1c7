from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import make_model
from torch.nn.functional import cross_entropy
from trainings import VOCABULARY, gradients, random_row
from transformers import DynamicCache, PreTrainedModel

from edgetune.objectives import packing
from edgetune.objectives.example import Example
from edgetune.objectives.packing import PackedRows, pack, shared_length, take_packed_rows

SYSTEM = range(10, 22)


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], PreTrainedModel]:
    """`model_of(arch)`: a tiny model in double precision, so that only wrong results differ; gemma3's window is 16."""
    return cache(lambda arch: make_model(arch, VOCABULARY).double())


def row(*tokens: int, learned_from: int = 1) -> Example:
    return Example(tokens, tuple(i >= learned_from for i in range(len(tokens))), learned_from)


ROWS = {
    "rows of different lengths": [
        random_row(1, 40, learned_from=30), random_row(2, 9, learned_from=5), random_row(3, 23, learned_from=20),
    ],
    "rows with a shared beginning": [
        random_row(1, 40, SYSTEM, learned_from=33), random_row(2, 14, SYSTEM, learned_from=13),
        random_row(3, 25, SYSTEM, learned_from=18),
    ],
    "loss on the whole rows": [random_row(1, 30, SYSTEM), random_row(2, 20, SYSTEM)],
    "learned tokens with gaps": [
        Example((5, 6, 7, 8, 9, 10), (False, True, False, True, False, True), 5), random_row(2, 20, learned_from=4),
    ],
    "a single row": [random_row(1, 40, learned_from=10)],
    "a row that is the beginning of another": [random_row(1, 24), row(*random_row(1, 24).tokens[:19])],
    "equal rows": [random_row(1, 24, learned_from=20)] * 2,
}  # fmt: skip


def packed_logits(model: PreTrainedModel, packed: PackedRows, keep: torch.Tensor | int = 0) -> torch.Tensor:
    take_packed_rows(model)
    out = model(
        input_ids=packed.tokens, position_ids=packed.positions, logits_to_keep=keep, packed=packed, use_cache=False
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def loss_packed(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    packed = pack(examples)
    return cross_entropy(packed_logits(model, packed, packed.predictors), packed.targets)


def loss_alone(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """The mean over all learned tokens, each row run by itself with transformers' own attention."""
    model.set_attn_implementation("sdpa")
    logits, targets = [], []
    for example in examples:
        learned = [i for i, wanted in enumerate(example.learned) if wanted]
        out = model(input_ids=torch.tensor([example.tokens]), use_cache=False).logits[0]
        logits.append(out[[i - 1 for i in learned]])
        targets += [example.tokens[i] for i in learned]
    return cross_entropy(torch.cat(logits), torch.tensor(targets))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "lfm2", "qwen35"])
@pytest.mark.parametrize("case", ROWS)
def test_packed_rows_learn_as_rows_run_alone(arch: str, case: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model, examples = model_of(arch), ROWS[case]
    loss, expected = loss_packed(model, examples), loss_alone(model, examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        # Norms are computed in single precision by transformers, whatever the model's is.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "lfm2", "qwen35"])
def test_a_row_changes_no_other_row(arch: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    examples = ROWS["rows with a shared beginning"]
    middle = examples[1].tokens
    changed = [examples[0], row(*middle[: len(SYSTEM)], *reversed(middle[len(SYSTEM) :])), examples[2]]
    shared, first, second = len(SYSTEM), len(examples[0].tokens), len(middle) - len(SYSTEM)
    with torch.no_grad():
        before, after = (packed_logits(model_of(arch), pack(rows)) for rows in (examples, changed))
    own = slice(first, first + second)
    assert not torch.allclose(before[own], after[own])
    for others in (slice(0, first), slice(first + second, None)):
        assert torch.equal(before[others], after[others])
    assert len(before) == shared + sum(len(example.tokens) - shared for example in examples)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("case", ["rows of different lengths", "rows with a shared beginning", "a single row"])
def test_rows_behind_a_cache_or_tokens_are_as_with_these_in_front(
    arch: str, case: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model, examples, front = model_of(arch), ROWS[case], list(range(300, 320))
    whole = [row(*front, *example.tokens) for example in examples]
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        wanted = [model(input_ids=torch.tensor([example.tokens])).logits[0, len(front) :] for example in whole]
        cache = DynamicCache()
        model(input_ids=torch.tensor([front]), cache=cache, use_cache=True)
        packed = pack(examples)
        behind_tokens = replace(
            packed.after_tokens(len(front)), tokens=torch.cat([torch.tensor([front]), packed.tokens], 1)
        )
        after_tokens = packed_logits(model, behind_tokens)[len(front) :]
        take_packed_rows(model)
        behind_cache = packed.after_cache(len(front))
        after_cache = model(
            input_ids=packed.tokens, position_ids=behind_cache.positions, packed=behind_cache, cache=cache
        ).logits[0]
    shared = shared_length(examples)
    in_order = torch.cat([wanted[0][:shared], *(logits[shared:] for logits in wanted)])
    torch.testing.assert_close(after_tokens, in_order, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after_cache, in_order, rtol=1e-4, atol=1e-5)


def test_attention_in_bf16_is_two_products_that_give_what_the_kernel_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(ROWS["rows with a shared beginning"])
    torch.manual_seed(0)
    states = [torch.randn(1, heads, packed.tokens.shape[1], 8).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    towards = torch.randn(1, packed.tokens.shape[1], 6, 8).bfloat16()

    def found(most_keys: int) -> list[torch.Tensor]:
        monkeypatch.setattr(packing, "MOST_KEYS", most_keys)
        query, key, value = states
        out, _ = packing.packed_attention(torch.nn.Module(), query, key, value, None, packed=packed, sliding_window=16)
        return [out.detach(), *torch.autograd.grad(out, states, towards)]

    for products, kernel in zip(found(packing.MOST_KEYS), found(0), strict=True):
        assert not torch.equal(products, kernel)
        torch.testing.assert_close(products, kernel, rtol=0.05, atol=0.05)


def test_no_architecture_is_imported_before_a_model_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent = ("transformers.models.lfm2", "transformers.models.qwen3_5")
    for name in [name for name in sys.modules if name.startswith(recurrent)]:
        monkeypatch.delitem(sys.modules, name)
    runpy.run_path(packing.__file__)
    assert not [name for name in sys.modules if name.startswith(recurrent)]


def test_the_shared_beginning_is_in_the_sequence_once() -> None:
    examples = ROWS["rows with a shared beginning"]
    packed = pack(examples)
    lengths = [len(example.tokens) for example in examples]
    assert packed.tokens[0, : len(SYSTEM)].tolist() == list(SYSTEM)
    assert packed.tokens.shape == packed.positions.shape == (1, sum(lengths) - 2 * len(SYSTEM))
    starts = (packed.positions[0] == len(SYSTEM)).nonzero().flatten().tolist()
    assert starts == [len(SYSTEM), lengths[0], lengths[0] + lengths[1] - len(SYSTEM)]


def test_each_row_keeps_a_token_of_its_own() -> None:
    packed = pack([row(5, 6, 7), row(5, 6, 7, 8)])
    assert packed.tokens.tolist() == [[5, 6, 7, 7, 8]]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert packed.targets.tolist() == [6, 7, 6, 7, 8]
    assert packed.predictors.tolist() == [0, 1, 0, 1, 3]
