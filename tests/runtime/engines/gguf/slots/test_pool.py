from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from edgetune_runtime import EdgetuneError, IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.engines.gguf.slots import SlotPool
from edgetune_runtime.errors import BusyError
from runtime.bundles import low_rank, write_adapter
from runtime.engines.gguf.slots.steps import TOKENS, Steps, checked, plain, with_slots

AdapterOf = Callable[[int], Path]
SUM = {"1": 0.5, "2": -2.0}


@contextmanager
def pooled(
    base: Path, adapter_of: AdapterOf, slots: int = 2, rank: int = 8, dtype: str = "f32"
) -> Iterator[tuple[SlotPool, Steps]]:
    """A pool with the adapters 1 to 4, and a context."""
    with with_slots(base, slots, rank, dtype=dtype) as (model, steps):
        pool = SlotPool(model, checked(base), dtype)
        for seed in range(1, 5):
            pool.add(str(seed), adapter_of(seed))
        yield pool, steps


def test_the_least_recently_used_adapter_goes_first_and_used_ones_stay(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (pool, _):
        with pool.use({"1": 1.0}) as first, pool.use({"2": 1.0}) as second:
            assert {first.slot, second.slot} == {1, 2}
        with pool.use({"1": 1.0}) as again:
            assert again == first
            with pool.use({"3": 1.0}) as third:
                assert third.slot == second.slot
        assert [pool.is_current(use) for use in (first, second, third)] == [True, False, True]
        with pool.use({"4": 1.0}) as fourth:
            assert fourth.slot == first.slot


def test_more_adapters_at_once_than_slots_are_refused_and_nothing_is_lost(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (pool, steps), pool.use({"1": 1.0}) as first, pool.use({"2": 1.0}):
        expected = steps.decode(TOKENS, 0, first.slot)
        with pytest.raises(BusyError, match="running calls use all 2 slots for other adapters; wait"), pool.use(SUM):
            pass
        with pool.use({"1": 1.0}) as again, pool.use({}) as bare:
            assert (again, bare.slot) == (first, 0)
        np.testing.assert_array_equal(steps.decode(TOKENS, 1, first.slot), expected)


def test_sums_and_scales_are_slots_of_their_own(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (pool, steps):
        with plain(base, {adapter_of(1): 0.5, adapter_of(2): -2.0}) as both, pool.use(SUM) as use:
            wanted = both.decode(TOKENS)
            np.testing.assert_allclose(steps.decode(TOKENS, 0, use.slot), wanted, rtol=0, atol=5e-3)
        with pool.use({"2": -2.0, "3": 0.0, "1": 0.5}) as again:
            assert again == use
        with plain(base, {adapter_of(1): 0.5}) as half, pool.use({"1": 0.5}) as scaled:
            assert scaled.slot != use.slot
            np.testing.assert_allclose(steps.decode(TOKENS, 1, scaled.slot), half.decode(TOKENS), rtol=0, atol=2e-3)
        with pool.use({"1": 0.0}) as none:
            assert none.slot == 0


def test_alpha_and_adapters_of_some_matrices_are_applied_as_llama_does(base: Path, tmp_path: Path) -> None:
    pairs = low_rank(base, 7, rank=3, size=0.1)
    # The file has alpha 3, the rank of the first pair; the other one has rank 6, and so half the scale.
    pairs["blk.0.ffn_up.weight"] = low_rank(base, 8, 6, ["blk.0.ffn_up.weight"], 0.1)["blk.0.ffn_up.weight"]
    path = write_adapter(base, tmp_path / "a.gguf", pairs)
    with with_slots(base, 1) as (model, steps), plain(base, {path: 1.5}) as adapted:
        pool = SlotPool(model, checked(base), "f32")
        pool.add("a", path)
        with pool.use({"a": 1.5}) as use:
            np.testing.assert_allclose(steps.decode(TOKENS, 0, use.slot), adapted.decode(TOKENS), rtol=0, atol=2e-3)


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0"])
def test_adapters_of_each_type_are_read_as_llama_reads_them(stored: str, base: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[stored]
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("general.type", "adapter"), ("adapter.type", "lora")):
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", 32.0)
    # q8_0 has blocks of 32.
    for name, pair in low_rank(base, 3, rank=32, size=0.05).items():
        for which, values in zip("ab", pair, strict=True):
            writer.add_tensor(f"{name}.lora_{which}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with with_slots(base, 1, 32) as (model, steps), plain(base, {path: 1.0}) as adapted:
        pool = SlotPool(model, checked(base), "f32")
        pool.add("a", path)
        with pool.use({"a": 1.0}) as use:
            found, wanted = steps.decode(TOKENS, 0, use.slot), adapted.decode(TOKENS)
        # llama.cpp rounds activations to the adapter's type: bf16 has 8 bits, and changes of the logits are about 1.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.03)


def test_factors_in_16_bits_change_little(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (whole, steps), pooled(base, adapter_of, dtype="f16") as (half, others):
        with whole.use({"1": 1.0}) as use, half.use({"1": 1.0}) as other:
            found, wanted = others.decode(TOKENS, 0, other.slot), steps.decode(TOKENS, 0, use.slot)
        # Each factor has an error of 2^-12, and the adapter changes the logits by more than 1.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-3)
        assert (found != wanted).any()


def test_a_slot_is_filled_while_another_thread_decodes(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (pool, steps), pool.use({"1": 1.0}) as use:
        expected = steps.decode(TOKENS, 0, use.slot)
        ended = threading.Event()

        def fill_again() -> None:
            while not ended.is_set():
                for seed in (2, 3, 4):
                    with pool.use({str(seed): 1.0}):
                        pass

        thread = threading.Thread(target=fill_again)
        thread.start()
        try:
            for _ in range(50):
                steps.drop()
                np.testing.assert_array_equal(steps.decode(TOKENS, 0, use.slot), expected)
        finally:
            ended.set()
            thread.join()


def test_a_removed_adapter_runs_on_and_its_name_can_be_given_again(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (pool, steps), pool.use({"1": 1.0}) as use:
        expected = steps.decode(TOKENS, 0, use.slot)
        pool.remove("1")
        np.testing.assert_array_equal(steps.decode(TOKENS, 1, use.slot), expected)
        with pytest.raises(NotFoundError, match="adapter '1' is not loaded"), pool.use({"1": 1.0}):
            pass
        with pytest.raises(NotFoundError, match="adapter '1' is not loaded"):
            pool.remove("1")
        pool.add("1", adapter_of(2))
        pool.add("1", adapter_of(3))
        with pool.use({"1": 1.0}) as new:
            assert new.slot != use.slot
            found = steps.decode(TOKENS, 2, new.slot)
    with pooled(base, adapter_of) as (pool, steps), pool.use({"2": 1.0}) as use:
        np.testing.assert_array_equal(steps.decode(TOKENS, 0, use.slot), found)


def test_the_slot_of_a_removed_adapter_is_filled_first(base: Path, adapter_of: AdapterOf) -> None:
    with pooled(base, adapter_of) as (pool, _):
        with pool.use({"1": 1.0}) as first:
            pass
        with pool.use({"2": 1.0}) as second:
            pass
        pool.remove("2")
        with pool.use({"3": 1.0}) as third:
            assert third.slot == second.slot
        assert pool.is_current(first)


def refused(pool: SlotPool, path: Path, kind: type[EdgetuneError], match: str) -> None:
    pool.add("bad", path)
    with pytest.raises(kind, match=match), pool.use({"bad": 1.0}):
        pass
    pool.remove("bad")


def test_adapters_that_slots_cannot_have_are_refused_and_calls_go_on(
    base: Path, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    wide = write_adapter(base, tmp_path / "wide", low_rank(base, 1, rank=9))
    # Of the embedding, files have both matrices transposed.
    pair = np.ones((384, 4), np.float32), np.ones((64, 4), np.float32)
    embedding = write_adapter(base, tmp_path / "embedding", {"token_embd.weight": pair})
    large = write_adapter(base, tmp_path / "large", {n: (a * 1e6, b) for n, (a, b) in low_rank(base, 1).items()})
    damaged = Path(shutil.copy(adapter_of(3), tmp_path / "damaged"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with ExitStack() as stack:
        pool, steps = stack.enter_context(pooled(base, adapter_of, dtype="f16"))
        use = stack.enter_context(pool.use({"1": 1.0}))
        expected = steps.decode(TOKENS, 0, use.slot)
        refused(pool, wide, IncompatibleError, "'bad' has rank 9, and slots have rank 8; open")
        refused(pool, embedding, IncompatibleError, "changes 'token_embd.weight', and slots have no place for that")
        refused(pool, large, IncompatibleError, "not finite in float16")
        refused(pool, damaged, VerificationError, "truncated")
        refused(pool, base, VerificationError, "general.type")
        refused(pool, tmp_path / "none", NotFoundError, "no file")
        with pytest.raises(UsageError, match="scale nan"), pool.use({"1": float("nan")}):
            pass
        pool.add("bad", adapter_of(2))
        with pool.use({"bad": 1.0}) as good:
            assert good.slot != use.slot
        np.testing.assert_array_equal(steps.decode(TOKENS, 1, use.slot), expected)
