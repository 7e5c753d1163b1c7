from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime.engines.gguf.llama import library
from edgetune_runtime.engines.gguf.slots.states import in_slot
from edgetune_runtime.engines.gguf.state import check_state
from runtime.bundles import low_rank, write_adapter
from runtime.engines.gguf.slots.steps import OTHERS, TOKENS, Steps, fill, plain, with_slots

AdapterOf = Callable[[int], Path]
# llama.cpp rotates quantized heads of 64 and 128, and not those of 32.
KV = [("f16", 64), ("q8_0", 128), ("q8_0", 256), ("q8_0", 512)]
AFTER = len(TOKENS)


def moved(steps: Steps, state: bytes | bytearray, slot: int, sequence: int = 40) -> np.ndarray:
    """The logits after the next tokens of a state that is restored in a slot."""
    steps.drop(sequence)
    steps.restore(in_slot(state, slot), sequence)
    return steps.decode(OTHERS, sequence, slot, AFTER)


@pytest.mark.parametrize(("kv", "width"), KV)
def test_a_saved_state_goes_on_bit_for_bit_in_any_slot(
    kv: str, width: int, wide_gguf: Callable[[int], Path], tmp_path: Path
) -> None:
    base = wide_gguf(width)
    files = [write_adapter(base, tmp_path / f"{seed}.gguf", low_rank(base, seed, size=0.2)) for seed in (1, 2)]
    with with_slots(base, 13, kv=kv) as (model, steps):
        for slot in (1, 7, 13):
            fill(model, base, slot, files[0])
        fill(model, base, 2, files[1])
        states, expected = {}, {}
        for slot in (0, 1, 2, 13):
            steps.decode(TOKENS, slot, slot)
            states[slot] = steps.save(slot)
            expected[slot] = steps.decode(OTHERS, slot, slot, AFTER)
            # Sums depend on the cells that a sequence has, so each has the first ones.
            steps.drop(slot)
        neutral = {slot: in_slot(state, 0) for slot, state in states.items()}
        check_state(memoryview(neutral[13]), 256)
        # Neither the slot nor the sequence leaves a trace.
        assert neutral[1] == neutral[13] != neutral[2]
        for slot in (1, 7, 13):
            np.testing.assert_array_equal(moved(steps, neutral[1], slot), expected[1])
        np.testing.assert_array_equal(moved(steps, neutral[2], 2), expected[2])
        np.testing.assert_array_equal(moved(steps, neutral[0], 0), expected[0])
        assert np.abs(expected[1] - expected[2]).max() > 0.1


def test_moving_a_state_to_its_own_slot_changes_none_of_its_values(base: Path, adapter_of: AdapterOf) -> None:
    with with_slots(base) as (model, steps):
        fill(model, base, 2, adapter_of(1))
        steps.decode(TOKENS, 0, 2)
        state = steps.save()
        assert in_slot(state, 2) == in_slot(in_slot(state, 0), 2) == state


def test_a_state_goes_on_with_another_adapter_as_with_llama(base: Path, adapter_of: AdapterOf) -> None:
    llama = library()
    with (
        with_slots(base) as (model, steps),
        plain(base, {adapter_of(1): 1.0}) as first,
        plain(base, {adapter_of(2): 1.0}) as second,
    ):
        fill(model, base, 1, adapter_of(1))
        fill(model, base, 2, adapter_of(2))
        steps.decode(TOKENS, 0, 1)
        first.decode(TOKENS)
        kept = first.save()
        second.restore(kept)
        # Between plain contexts, llama.cpp itself keeps the state and switches the adapter.
        found = moved(steps, steps.save(), 2)
        np.testing.assert_allclose(found, second.decode(OTHERS, start=AFTER), rtol=0, atol=2e-3)
        llama.llama_set_adapters_lora(second.context, None, 0, None)
        second.drop()
        second.restore(kept)
        found = moved(steps, steps.save(), 0)
        np.testing.assert_allclose(found, second.decode(OTHERS, start=AFTER), rtol=0, atol=2e-3)


@pytest.mark.parametrize("through", ["a state", "a control token"])
def test_an_adapter_can_begin_in_the_middle_of_a_sequence(through: str, base: Path, adapter_of: AdapterOf) -> None:
    with with_slots(base) as (model, steps), plain(base) as bare, plain(base, {adapter_of(1): 1.0}) as adapted:
        fill(model, base, 2, adapter_of(1))
        bare.decode(TOKENS)
        adapted.restore(bare.save())
        expected = adapted.decode(OTHERS, start=AFTER)
        steps.decode(TOKENS)
        if through == "a state":
            found = moved(steps, steps.save(), 2)
        else:
            found = steps.decode(OTHERS, 0, 2, AFTER, begins=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
