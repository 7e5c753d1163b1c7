from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import EdgetuneError, IncompatibleError, Runtime
from edgetune_runtime.engines.gguf.slots.sequences import Row, SlotSequences
from edgetune_runtime.engines.onnx.rows import Rows, RowStep
from edgetune_runtime.inference.generation import Answer
from runtime.fresh import ENGINES

CHOICES = (None, "one", "two", {"one": 0.5})
PROMPTS = ("turn on the light", "play music in the hall", "stop")
TOKENS = 24


@pytest.fixture
def runtime(prompted_for: Callable[[str], Path]) -> Iterator[Runtime]:
    with Runtime.open(prompted_for("batch"), **ENGINES["batch"], contexts=4, disk_mb=0) as opened:
        yield opened


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences in each step of a batch."""
    seen: list[int] = []
    decode = SlotSequences.decode

    def looking(sequences: SlotSequences, rows: Sequence[Row]) -> object:
        seen.append(len(rows))
        return decode(sequences, rows)

    monkeypatch.setattr(SlotSequences, "decode", looking)
    return seen


def answer(runtime: Runtime, number: int, **options: object) -> Answer:
    """A sampled answer, because greedy ones of a random model repeat a token."""
    prompt, choice = PROMPTS[number % 3], CHOICES[number % 4]
    return runtime.generate(prompt, adapter=choice, max_tokens=TOKENS, temperature=1.5, seed=number, **options)


def together(runtime: Runtime, numbers: Sequence[int], callers: int = 4) -> list[str]:
    with ThreadPoolExecutor(callers) as threads:
        return list(threads.map(lambda number: answer(runtime, number).text, numbers))


def test_calls_with_different_adapters_share_steps_and_answer_as_alone(runtime: Runtime, sizes: list[int]) -> None:
    numbers = range(12)
    alone = [answer(runtime, number).text for number in numbers]
    assert set(sizes) == {1}
    assert together(runtime, numbers) == alone
    assert max(sizes) > 1
    # Also in other sequences and slots, and beside others.
    assert together(runtime, numbers[::-1], callers=3) == alone[::-1]


def test_calls_share_steps_in_onnx(prompted_for: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = Rows.decode

    def looking(rows: Rows, steps: Sequence[RowStep], vocab_size: int, options: object) -> object:
        sizes.append(len(steps))
        return decode(rows, steps, vocab_size, options)

    options = {"engine": "onnx", "batching": True, "contexts": 4, "disk_mb": 0}
    try:
        runtime = Runtime.open(prompted_for("onnx"), **options)
    except IncompatibleError as error:
        # So it is where onnxruntime has no AVX-512 code.
        assert "would change last bits" in str(error)
        return
    with runtime:
        monkeypatch.setattr(Rows, "decode", looking)
        alone = [answer(runtime, number).text for number in range(12)]
        assert together(runtime, range(12)) == alone
    assert max(sizes) > 1


def test_calls_that_end_early_change_no_other_answer(runtime: Runtime) -> None:
    alone = [answer(runtime, number).text for number in range(12)]

    def ends_early(number: int) -> str:
        cancel = threading.Event()
        timer = threading.Timer(0.003 * number, cancel.set)
        timer.start()
        return answer(runtime, number, cancel=cancel, deadline_s=0.02 if number % 2 else None).text

    with ThreadPoolExecutor(4) as threads:
        whole = threads.map(lambda number: answer(runtime, number).text, range(12))
        early = threads.map(ends_early, range(12))
        assert list(whole) == alone
        # Also of those whose token was computed on another thread while they ended.
        assert all(text.startswith(begun) for text, begun in zip(alone, early, strict=True))
    assert together(runtime, range(12)) == alone


def test_a_step_that_fails_for_several_is_computed_for_each(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, failures, submit = [answer(runtime, number).text for number in range(4)], 0, SlotSequences._submit

    def failing(sequences: SlotSequences, rows: Sequence[Row]) -> None:
        nonlocal failures
        if len(rows) > 1:
            failures += 1
            raise EdgetuneError("llama.cpp cannot decode", "")
        submit(sequences, rows)

    monkeypatch.setattr(SlotSequences, "_submit", failing)
    assert together(runtime, range(4)) == alone
    assert failures


@pytest.mark.parametrize("then", ["two", {"one": 1.0, "two": 1.0}], ids=["in a slot", "beside"])
def test_a_session_goes_on_with_other_adapters(then: object, runtime: Runtime) -> None:
    with runtime.session("one") as session:
        session.send(PROMPTS[0], max_tokens=4)
        session.use(then, carry="reuse")
        assert session.send(PROMPTS[1], max_tokens=4).timings.carried_tokens > 0


def test_adapters_that_a_slot_cannot_hold_run_beside(runtime: Runtime, sizes: list[int]) -> None:
    both = {"one": 1.0, "two": 1.0}
    text = runtime.generate(PROMPTS[0], adapter=both, max_tokens=4).text
    assert not sizes
    assert together(runtime, range(2)) == [answer(runtime, number).text for number in range(2)]
    assert runtime.generate(PROMPTS[0], adapter=both, max_tokens=4).text == text


def test_labels_are_scored_beside_others(runtime: Runtime) -> None:
    labels = ("light", "light off", "music")
    alone = runtime.classify(PROMPTS[0], labels, adapter="one")
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(answer, runtime, number) for number in range(2)]
        assert runtime.classify(PROMPTS[0], labels, adapter="one") == alone
        for other in others:
            other.result()


def test_a_processor_on_which_rows_have_other_bits_is_refused_unless_calls_need_not_be_exact(
    prompted_for: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SlotSequences.decode

    def rounding(sequences: SlotSequences, rows: Sequence[Row]) -> list[np.ndarray]:
        return [logits * np.float32(1 + (len(rows) > 1) * 1e-6) for logits in decode(sequences, rows)]

    monkeypatch.setattr(SlotSequences, "decode", rounding)
    with pytest.raises(IncompatibleError, match="would change last bits of answers with this base"):
        Runtime.open(prompted_for("batch"), **ENGINES["batch"], contexts=2, disk_mb=0)
    Runtime.open(prompted_for("batch"), **ENGINES["batch"], contexts=2, disk_mb=0, exact=False).close()


def test_another_architecture_is_refused_by_name(prompted_of: Callable[[str], Path]) -> None:
    with pytest.raises(IncompatibleError, match="its architecture is qwen2"):
        Runtime.open(prompted_of("qwen2"), batching=True, disk_mb=0)
