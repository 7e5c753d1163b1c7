"""Steps of real engines that are stopped, or restarted when they stall."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_runtime import Runtime
from edgetune_runtime.engines.base import Engine, Logits, StepStopped
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.inference.measuring import loaded_bundle
from edgetune_runtime.limits import CallLimits, Stopped
from edgetune_runtime.serving.governor import AnswerUsage, Clock, Governor, Step
from edgetune_runtime.serving.turns import Turn
from edgetune_runtime.threads.count import DECODE, PREFILL

TRIES = 2000
TOKENS = [5, 9, 4, 3] * 20


@pytest.fixture(params=["gguf", "onnx"])
def engine(request: pytest.FixtureRequest, prompted_of: Callable[[str], Path]) -> Iterator[Engine]:
    with Runtime.open(prompted_of("llama"), engine=request.param, contexts=1, disk_mb=0) as runtime:
        context, _ = loaded_bundle(runtime).context()
        yield context.engine


@contextmanager
def _stopping(engine: Engine) -> Iterator[None]:
    """Another thread that asks for the end of the step again and again."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            engine.stop_step()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _again_and_again(engine: Engine, tokens: Sequence[int], keep: int) -> Logits:
    """A step that goes on until it is stopped."""
    for _ in range(TRIES):
        engine.decode(tokens)
        engine.truncate(keep)
    raise AssertionError("the step was not stopped")


def test_a_stopped_step_leaves_the_sequence_as_it_was(engine: Engine) -> None:
    first = engine.decode(TOKENS[:7]).copy()
    rest = engine.decode_all(TOKENS[7:]).copy()
    for step in (engine.decode, engine.decode_all):
        engine.truncate(7)
        with pytest.raises(StepStopped), _stopping(engine):
            for _ in range(TRIES):
                step(TOKENS[7:])
                engine.truncate(7)
        assert np.array_equal(engine.decode_all(TOKENS[7:]), rest)
    engine.truncate(0)
    assert np.array_equal(engine.decode(TOKENS[:7]), first)


def test_scoring_that_was_stopped_can_be_done_again(engine: Engine) -> None:
    continuations = [[4, 5, 6, 7] * 3, [4, 5, 6, 8] * 3, [9, 9]]
    engine.decode(TOKENS)
    expected = engine.score(continuations)
    with pytest.raises(StepStopped), _stopping(engine):
        for _ in range(TRIES):
            engine.score(continuations)
    assert engine.score(continuations) == expected


@pytest.mark.parametrize("reason", ["deadline", "cancelled"])
def test_a_step_ends_when_its_call_is_to_stop(engine: Engine, reason: str) -> None:
    cancel = threading.Event()
    limits = CallLimits(0.05 if reason == "deadline" else None, cancel)
    engine.decode(TOKENS[:5])
    governor = Governor(engine.threads, adjusts=engine.adjusts_threads)
    threading.Timer(0.05, cancel.set).start() if reason == "cancelled" else None
    step = partial(_again_and_again, engine, TOKENS, 5)
    with pytest.raises(Stopped, match=reason):
        governor.step(engine, len(TOKENS), step, limits.check, AnswerUsage())
    assert engine.truncate(5) == 5


@pytest.fixture(scope="module")
def wide_q4_0(wide_gguf: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in q4_0, which llama.cpp repacks, whose heads are wide enough for keys and values in q8_0."""
    path = tmp_path_factory.mktemp("wide") / "q4_0.gguf"
    quantize_gguf(wide_gguf(128), path, "q4_0")
    return path


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("repack", [True, False])
def test_any_number_of_threads_gives_the_same_bits(wide_q4_0: Path, kv: str, repack: bool) -> None:
    with closing(GgufEngine(wide_q4_0, context_length=128, threads=4, kv=kv, repack=repack)) as engine:
        found = []
        for threads in (1, 2, 3, 4):
            engine.use_threads(threads)
            engine.truncate(0)
            logits = [engine.decode(TOKENS).copy(), engine.decode([7]).copy()]
            found.append((np.stack(logits), engine.score([[1, 2, 3], [1, 2, 4]])))
    for logits, scores in found[1:]:
        assert np.array_equal(logits, found[0][0])
        assert scores == found[0][1]


def test_a_step_that_stalls_is_restarted_with_fewer_threads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if not engine.adjusts_threads:
        pytest.skip("onnxruntime's threads take over each other's work")
    monkeypatch.setattr(Governor, "_stalls", lambda _, step, *__: step.threads > 1)
    governor, tries = Governor(4, adjusts=True), []
    monkeypatch.setattr(governor._count, "start_over", lambda: None)

    def step() -> Logits:
        tries.append(governor.threads)
        return _again_and_again(engine, TOKENS, 0) if governor.threads > 1 else engine.decode(TOKENS)

    found = governor.step(engine, len(TOKENS), step, lambda: None, AnswerUsage()).copy()
    assert tries == [4, 2, 1]
    engine.truncate(0)
    assert np.array_equal(engine.decode(TOKENS), found)


def _steps(governor: Governor, token_s: float, share: float) -> AnswerUsage:
    """An answer of single tokens that took so long each and had that share of two cores."""
    usage = AnswerUsage()
    for _ in range(8):
        governor._record(Step(Turn(2, is_shared=False), 2, 1, DECODE), (token_s, token_s * share * 2), usage)
    return usage


def test_an_answer_is_slow_when_it_lacked_cores_or_took_much_longer_than_before() -> None:
    governor = Governor(2, adjusts=False)
    usages = [_steps(governor, 0.02, share=1.0), _steps(governor, 0.05, share=1.0), _steps(governor, 0.02, share=0.5)]
    assert [governor.is_slow(usage) for usage in (AnswerUsage(), *usages)] == [False, False, True, True]


def test_an_answer_is_not_slow_because_others_share_the_cores() -> None:
    governor, usage = Governor(2, adjusts=False), AnswerUsage()
    _steps(governor, 0.02, share=1.0)
    for _ in range(8):
        governor._record(Step(Turn(1, is_shared=True), 1, 1, DECODE), (0.05, 0.05), usage)
    assert not governor.is_slow(usage)
    for _ in range(8):
        governor._record(Step(Turn(1, is_shared=True), 1, 1, DECODE), (0.05, 0.02), usage)
    assert governor.is_slow(usage), "another process had the core"


def test_a_chunk_of_a_prompt_shrinks_where_steps_are_slow() -> None:
    governor = Governor(2, adjusts=False)
    found = [governor.chunk(128)]
    for token_s in (0.001, 0.003, 0.1):
        took = 128 * token_s, 2 * 128 * token_s
        governor._record(Step(Turn(2, is_shared=False), 2, 128, PREFILL), took, AnswerUsage())
        found.append(governor.chunk(128))
    assert found == [128, 128, 64, 16]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads of a process from /proc")
@pytest.mark.parametrize("priority", ["normal", "low"])
def test_a_call_leaves_no_compute_threads_which_would_slow_down_calls_of_other_threads(
    priority: str, prompted_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> set[int]:
        return {int(path.name) for path in Path("/proc/self/task").iterdir()}

    def left_by(call: Callable[[], object]) -> int:
        """The threads that are not Python's which a call on a new thread leaves."""
        counts = list[int]()

        def count() -> None:
            before = threads()
            call()
            counts.append(len(threads() - before - {thread.native_id for thread in threading.enumerate()}))

        caller = threading.Thread(target=count)
        caller.start()
        caller.join()
        return counts[0]

    # All threads, however busy the machine is.
    monkeypatch.setattr(GgufEngine, "adjusts_threads", False)
    with Runtime.open(prompted_of("llama"), engine="gguf", threads=2, disk_mb=0, priority=priority) as runtime:
        assert left_by(lambda: runtime.generate("hello", max_tokens=2)) == 0
        with closing(runtime.stream("hello", max_tokens=6)) as stream:
            assert [left_by(lambda: next(stream)) for _ in range(3)] == [0, 0, 0], "each piece on another thread"
        context, _ = loaded_bundle(runtime).context()
        assert left_by(lambda: context.engine.decode([5, 6])) == 1


def test_single_tokens_have_the_threads_that_make_them_faster_and_prompts_all(
    prompted_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, int]] = []
    with Runtime.open(prompted_of("llama"), engine="gguf", contexts=1, threads=2, disk_mb=0) as runtime:
        context, _ = loaded_bundle(runtime).context()
        engine, governor, usage = context.engine, Governor(2, adjusts=True), AnswerUsage()
        monkeypatch.setattr(governor._count, "start_over", lambda: None)
        # Of one thread, a token takes half the time.
        monkeypatch.setattr(Clock, "read", lambda clock: (0.01 * used[-1][1], 0.01 * used[-1][1] ** 2))

        def compute(tokens: Sequence[int]) -> Logits:
            used.append((len(tokens), engine._used_threads))  # type: ignore[attr-defined]
            return engine.decode(tokens)

        for tokens in (TOKENS[:8], *[[7]] * 30, TOKENS[:8], [7]):
            kind = DECODE if len(tokens) == 1 else PREFILL
            governor.step(engine, len(tokens), partial(compute, tokens), lambda: None, usage, kind=kind)
    assert used[0] == (8, 2)
    assert used[1:25] == [(1, threads) for threads in (2, 1) * 3 for _ in range(4)]
    assert used[25:] == [*[(1, 1)] * 6, (8, 2), (1, 1)]
    assert not governor.is_slow(usage)
