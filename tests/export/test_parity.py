from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgetune_export.parity import TOLERANCE_KL, Parity, check, check_kept, compare, greedy_agreement
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.errors import UsageError, VerificationError

PROMPTS = [[7, 8, 9], [30, 40, 50, 60]]


@pytest.fixture
def engine(tiny_gguf: Callable[[str], Path], open_engine: Callable[..., Any]) -> GgufEngine:
    return open_engine(tiny_gguf("qwen3"))


@pytest.fixture
def same(tiny_gguf: Callable[[str], Path], open_engine: Callable[..., Any]) -> Callable[[list[int]], np.ndarray]:
    """A second engine in the role of the trained model."""
    other = open_engine(tiny_gguf("qwen3"))

    def run(tokens: list[int]) -> np.ndarray:
        other.truncate(0)
        return np.array(other.decode_all(tokens))

    return run


def test_equal_models_agree_wholly(engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]) -> None:
    parity = compare(same, engine, rows, prompts=PROMPTS, max_tokens=8)
    assert parity.kl < 1e-9
    assert (parity.top1, parity.greedy, parity.rows, parity.tokens) == (1.0, 8, 2, 62)


def test_the_divergence_is_that_of_the_exported_from_the_trained(
    engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]
) -> None:
    def flatter(tokens: list[int]) -> np.ndarray:
        return 0.5 * same(tokens)

    expected = []
    for row in rows:
        log_q = same(row).astype(np.float64)
        log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
        log_p = 0.5 * same(row).astype(np.float64)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        expected += list((np.exp(log_p) * (log_p - log_q)).sum(-1)[1:])
    parity = compare(flatter, engine, rows)
    assert "greedy" not in parity.figures()
    assert parity.kl == pytest.approx(np.mean(expected), rel=1e-4)
    assert parity.top1 == 1.0


def test_positions_with_another_favorite_lower_top1(
    engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]
) -> None:
    def swapped(tokens: list[int]) -> np.ndarray:
        logits = same(tokens)
        logits[:17] *= -1
        return logits

    assert compare(swapped, engine, rows).top1 == 15 / 31


def test_what_follows_the_first_token_counts_only_alone(
    engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]
) -> None:
    def wrong_at_first(tokens: list[int]) -> np.ndarray:
        logits = same(tokens)
        logits[0] *= -1
        return logits

    assert compare(wrong_at_first, engine, rows).kl < 1e-9
    alone = compare(wrong_at_first, engine, [rows[0][:1]])
    assert (alone.top1, alone.tokens) == (0.0, 1)
    assert alone.kl > 0.01


def test_logits_before_the_start_of_a_row_do_not_count(
    engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]
) -> None:
    def wrong_before(tokens: list[int]) -> np.ndarray:
        logits = same(tokens)
        logits[:8] *= -1
        return logits

    answers = compare(wrong_before, engine, rows, starts=[8] * len(rows))
    assert answers.kl < 1e-9 and answers.tokens == sum(len(row) - 8 for row in rows)
    assert compare(wrong_before, engine, rows).kl > 0.01


@pytest.mark.parametrize("kl", [0.22, float("nan")])
def test_a_merged_model_that_lost_most_of_its_training_is_refused_with_both_distances(kl: float) -> None:
    merged, plain = (Parity(each, top1=0.9, greedy=0, rows=2, tokens=25) for each in (kl, 0.24))
    message = f"'command' loses most of its training .* in q4_0: .* is {kl:.2g} on 25 tokens, .* plain base 0.24"
    with pytest.raises(VerificationError, match=message) as caught:
        check_kept(merged, plain, "command", "q4_0", 0.03)
    assert caught.value.remedy == "leave out merged_quantization, or set it to q8_0"
    check_kept(replace(merged, kl=0.11), plain, "command", "q4_0", 0.03)
    # One that was hardly trained.
    check_kept(merged, plain, "command", "q4_0", 0.3)


@pytest.mark.parametrize("position", [0, 3])
def test_greedy_answers_agree_up_to_the_first_other_choice(
    position: int, engine: GgufEngine, same: Callable[..., Any]
) -> None:
    def contrary(tokens: list[int]) -> np.ndarray:
        logits = same(tokens)
        logits[len(PROMPTS[0]) - 1 + position :] *= -1
        return logits

    assert greedy_agreement(contrary, engine, [PROMPTS[0]], 8) == position
    assert greedy_agreement(contrary, engine, PROMPTS, 8) <= position


def test_other_vocabularies_are_not_compared(
    engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]
) -> None:
    with pytest.raises(VerificationError, match="weights of the exported base"):
        compare(lambda tokens: same(tokens)[:, :-1], engine, rows)


@pytest.mark.parametrize("rows", [[], [[]]])
def test_nothing_to_compare_is_an_error(engine: GgufEngine, same: Callable[..., Any], rows: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="validation rows"):
        compare(same, engine, rows)


def test_a_divergence_past_the_tolerance_names_adapter_and_amount() -> None:
    with pytest.raises(VerificationError, match=r"'command'.*KL 0.5 on 64 tokens.*q4_1"):
        check(Parity(kl=0.5, top1=0.9, greedy=2, rows=2, tokens=64), "command", "q4_1")


@pytest.mark.parametrize("kl", [float("nan"), float("inf")])
def test_a_divergence_that_is_not_finite_is_no_bug_but_due_to_weights(kl: float) -> None:
    message = rf"adapter 'command' has logits that are NaN or infinite, .*KL {kl} on 64 tokens; look for weights"
    with pytest.raises(VerificationError, match=message):
        check(Parity(kl=kl, top1=0.9, greedy=2, rows=2, tokens=64), "command", "q4_1")


def test_a_plain_base_past_the_tolerance_is_no_adapter() -> None:
    with pytest.raises(VerificationError, match="the plain base does not match the trained model") as caught:
        check(Parity(kl=0.5, top1=0.9, greedy=0, rows=2, tokens=64), None, "q4_1")
    assert "adapter" not in str(caught.value)


@pytest.mark.parametrize("quantization", [*TOLERANCE_KL, "iq3_s"])
def test_a_divergence_within_the_tolerance_passes(quantization: str) -> None:
    kl = TOLERANCE_KL.get(quantization, 0.03)
    check(Parity(kl=kl, top1=1.0, greedy=16, rows=2, tokens=64), "command", quantization)


def test_an_unquantized_base_is_held_to_more_than_a_quantized_one() -> None:
    parity = Parity(kl=5e-3, top1=1.0, greedy=16, rows=2, tokens=64)
    check(parity, "command", "q4_1")
    with pytest.raises(VerificationError):
        check(parity, "command", "f16")


def test_a_quantized_adapter_is_allowed_the_rounding_of_its_type() -> None:
    parity = Parity(kl=5e-4, top1=1.0, greedy=16, rows=2, tokens=64)
    check(parity, "command", "f16", types=["q8_0"])
    with pytest.raises(VerificationError, match=r"expected at most 0\.001 "):
        check(replace(parity, kl=2e-3), "command", "f16", types=["q8_0"])


def test_a_merged_model_is_allowed_the_rounding_of_its_weights() -> None:
    parity = Parity(kl=0.2, top1=0.8, greedy=3, rows=2, tokens=64)
    check(parity, "command", "q4_1", merged=True)
    with pytest.raises(VerificationError, match="use a base quantization with more bits"):
        check(parity, "command", "q8_0", merged=True)
