from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import IncompatibleError, UsageError, VerificationError
from edgetune_runtime.engines.gguf.slots import compose
from runtime.engines.gguf.slots.steps import OTHERS, TOKENS, checked, fill, plain, with_slots
from runtime.gguf_files import rewritten

AdapterOf = Callable[[int], Path]
ROUNDING = {"": 2e-3, "q4_0": 0.1, "q8_0": 0.1}
"""Largest difference of logits between two ways to compute the same, by the type of the base.

Sums in another order differ in the last bit of float32. Before a product with f16 weights, an activation is rounded to
11 bits, and with quantized ones to 8; a value between two of these goes the other way. A batch and single steps of the
plain base differ as much for the same reason. Random adapters change the logits by more than 1.
"""


def quantized(base: Path, quantization: str, folder: Path) -> Path:
    from edgetune_export.base_file.quantize import quantize_gguf  # noqa: PLC0415 - torch only where needed

    if not quantization:
        return base
    quantize_gguf(base, folder / "quantized.gguf", quantization)
    return folder / "quantized.gguf"


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("quantization", ["", "q4_0", "q8_0"])
def test_base_alone_and_adapters_give_what_llama_gives(
    quantization: str, repack: bool, base: Path, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    path = quantized(base, quantization, tmp_path)
    with (
        plain(path, repack=repack) as bare,
        plain(path, {adapter_of(1): 1.0}, repack=repack) as adapted,
        with_slots(path, repack=repack) as (model, steps),
    ):
        fill(model, path, 1, adapter_of(1))
        expected = bare.decode(TOKENS)
        np.testing.assert_array_equal(steps.decode(TOKENS, 0), expected)
        np.testing.assert_array_equal(steps.decode(OTHERS[:1], 0, 0, 10), bare.decode(OTHERS[:1], start=10))
        found, wanted = steps.decode(TOKENS, 1, 1), adapted.decode(TOKENS)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING[quantization])
        assert np.abs(wanted - expected).max() > 1
        step = steps.decode(OTHERS[:1], 1, 1, 10)
        np.testing.assert_allclose(step, adapted.decode(OTHERS[:1], start=10), rtol=0, atol=ROUNDING[quantization])


def test_a_base_can_have_an_output_matrix_of_its_own(base: Path, tmp_path: Path) -> None:
    output = np.random.default_rng(0).normal(0, 0.1, (384, 64)).astype(np.float16)
    untied = rewritten(base, tmp_path / "base.gguf", tensors={"output.weight": output})
    with plain(untied) as bare, with_slots(untied) as (_, steps), plain(base) as tied:
        expected = bare.decode(TOKENS)
        np.testing.assert_array_equal(steps.decode(TOKENS), expected)
        assert np.abs(tied.decode(TOKENS) - expected).max() > 0.1


def test_an_adapter_gives_the_same_whatever_slot_it_is_in_and_whatever_the_others_hold(
    base: Path, adapter_of: AdapterOf
) -> None:
    random = np.random.default_rng(0)
    with with_slots(base, slots=5) as (model, steps):
        fill(model, base, 1, adapter_of(1))
        alone, after = steps.decode(TOKENS, 0, 1), steps.decode(OTHERS[:1], 0, 1, 10)
        for trial in range(8):
            slots = random.permutation(5) + 1
            for slot in slots[1:]:
                fill(model, base, slot, adapter_of(int(random.integers(2, 5))), float(random.normal()))
            fill(model, base, slots[0], adapter_of(1))
            steps.drop(trial)
            np.testing.assert_array_equal(steps.decode(TOKENS, trial, slots[0]), alone)
            np.testing.assert_array_equal(steps.decode(OTHERS[:1], trial, slots[0], 10), after)
            steps.drop(trial)


def test_a_batch_mixes_the_base_and_several_adapters(base: Path, adapter_of: AdapterOf) -> None:
    rows = {slot: (TOKENS[slot:], slot, 0) for slot in range(4)}
    with with_slots(base) as (model, steps):
        for slot in (1, 2, 3):
            fill(model, base, slot, adapter_of(slot))
        alone = [steps.decode(*row[:1], 10 + slot, slot) for slot, row in rows.items()]
        for found, wanted in zip(steps.batch(rows), alone, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING[""])
        alone = [steps.decode([9], 10 + slot, slot, 10 - slot) for slot in rows]
        together = steps.batch({slot: ([9], slot, 10 - slot) for slot in rows})
        for found, wanted in zip(together, alone, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING[""])
        assert np.abs(together[1] - together[2]).max() > 1


def test_an_overwritten_slot_has_nothing_of_what_it_held(base: Path, adapter_of: AdapterOf) -> None:
    with with_slots(base) as (model, steps):
        fill(model, base, 2, adapter_of(1))
        expected = steps.decode(TOKENS, 0, 2)
        fill(model, base, 2, adapter_of(2))
        assert np.abs(steps.decode(TOKENS, 1, 2) - expected).max() > 1
        model.write(2, {})
        np.testing.assert_array_equal(steps.decode(TOKENS, 2, 2), steps.decode(TOKENS, 3))
        fill(model, base, 2, adapter_of(1))
        np.testing.assert_array_equal(steps.decode(TOKENS, 4, 2), expected)


def test_sequences_with_any_first_token_can_use_an_adapter(base: Path, adapter_of: AdapterOf) -> None:
    with plain(base, {adapter_of(1): 1.0}) as adapted, with_slots(base) as (model, steps):
        fill(model, base, 1, adapter_of(1))
        for number, first in enumerate((1, 5, 300), 2):
            tokens = [first, *TOKENS]
            found, wanted = steps.decode(tokens, number, 1), adapted.decode(tokens, number)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING[""])
        # The tied output matrix has not changed with the embedding.
        with plain(base) as bare:
            np.testing.assert_array_equal(steps.decode(TOKENS), bare.decode(TOKENS))


def test_two_models_of_one_file_do_not_see_each_other(base: Path, adapter_of: AdapterOf) -> None:
    with with_slots(base) as (model, steps), with_slots(base) as (other, others):
        fill(model, base, 1, adapter_of(1))
        fill(other, base, 1, adapter_of(2))
        expected = steps.decode(TOKENS, 0, 1)
        assert np.abs(others.decode([9, *TOKENS], 0, 1)[1:] - expected).max() > 1
        np.testing.assert_array_equal(steps.decode(TOKENS, 1, 1), expected)


@pytest.mark.parametrize("repack", [False, True])
def test_a_control_token_in_a_text_is_refused(repack: bool, base: Path) -> None:
    with with_slots(base, repack=repack) as (model, _):
        control = model.tokens_for(1, [5], begins=True)[0]
        assert model.tokens_for(1, [5, 6], begins=False) == [5, 6]
        with pytest.raises(UsageError, match=f"token {control} chooses an adapter"):
            model.tokens_for(0, [5, control], begins=True)


def test_numbers_of_slots_and_ranks_that_are_impossible_are_refused(base: Path) -> None:
    header = checked(base)
    for slots, rank in ((0, 8), (3, 0), (-1, 8)):
        with pytest.raises(UsageError, match="not possible"):
            compose(base, header, slots, rank)
    with pytest.raises(IncompatibleError, match="13 tokens that can choose a slot, and 14 slots need as many"):
        compose(base, header, 14, 8)


def test_a_base_that_changes_while_it_is_opened_is_refused(base: Path, tmp_path: Path) -> None:
    changed = tmp_path / "base.gguf"
    for size, match in ((base.stat().st_size - 1000, "was changed while it was opened"), (100, "cannot read")):
        changed.write_bytes(base.read_bytes()[:size])
        with pytest.raises(VerificationError, match=match):
            compose(changed, checked(base), 2, 4)


def test_a_closed_model_can_be_closed_again(base: Path) -> None:
    model = compose(base, checked(base), 1, 1)
    model.close()
    model.close()
