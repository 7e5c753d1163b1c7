"""A base with recurrent layers continues from every cut as if it had computed only what is left."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import VerificationError
from edgetune_runtime.engines import checkpoints
from edgetune_runtime.engines.base import StepStopped
from edgetune_runtime.engines.gguf import needs
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from runtime.bundles import HYBRIDS
from runtime.engines.conftest import stop_next_step

Engine = GgufEngine | OnnxEngine
ENGINES: dict[str, type[Engine]] = {"gguf": GgufEngine, "onnx": OnnxEngine}
CONTEXT = 300
# Longer than a step of which an engine drops tokens.
PARTS = [list(range(start, start + 40)) for start in (100, 200, 300)]
NEXT = list(range(50, 58))


@pytest.fixture(scope="module", params=HYBRIDS, ids="-".join)
def engine(request: pytest.FixtureRequest, files_of: Callable[[str, str], dict[str, Path]]) -> Iterator[Engine]:
    """Each engine with each base. Tests share it, so each has to empty the sequence first."""
    base = files_of(*request.param)["base"]
    with closing(ENGINES[request.param[0]](base, context_length=CONTEXT, threads=1)) as opened:
        yield opened


@pytest.fixture
def undoing(engine: Engine) -> Engine:
    """The engines that can undo a part of a step."""
    if not engine.max_rollback:
        pytest.skip("the engine undoes whole steps only")
    return engine


def decoded(engine: Engine, parts: list[list[int]]) -> np.ndarray:
    """The logits after all parts, each a step, of an empty sequence."""
    engine.truncate(0)
    return [engine.decode(part) for part in parts][-1]


def test_a_cut_to_the_end_of_a_part_continues_bit_for_bit(engine: Engine) -> None:
    for count in range(1, 4):
        expected = decoded(engine, [*PARTS[:count], NEXT])
        decoded(engine, PARTS)
        engine.decode_all(NEXT)
        assert engine.truncate(40 * count) == 40 * count
        assert np.array_equal(engine.decode(NEXT), expected)


def test_a_cut_elsewhere_leaves_what_the_last_part_before_it_ended_with(engine: Engine) -> None:
    expected = decoded(engine, [*PARTS[:2], NEXT])
    decoded(engine, PARTS)
    assert engine.truncate(119) == 80
    assert np.array_equal(engine.decode(NEXT), expected)
    assert engine.truncate(39) == 0
    assert np.array_equal(decoded(engine, [*PARTS[:2], NEXT]), expected)


@pytest.mark.parametrize("dropped", range(1, len(NEXT)))
def test_rejected_tokens_of_a_step_are_dropped(undoing: Engine, dropped: int) -> None:
    decoded(undoing, PARTS)
    expected = undoing.decode_all(NEXT)
    decoded(undoing, PARTS)
    undoing.decode_all([*NEXT[:-dropped], *[7] * dropped])
    assert undoing.truncate(120 + len(NEXT) - dropped) == 120 + len(NEXT) - dropped
    state = undoing.save_state()
    found = undoing.decode_all(NEXT[-dropped:])
    np.testing.assert_allclose(found, expected[-dropped:], atol=0.01)
    undoing.restore_state(state)
    assert np.array_equal(undoing.decode_all(NEXT[-dropped:]), found)


def test_a_cut_after_scoring_goes_back_to_before_the_step(engine: Engine) -> None:
    decoded(engine, PARTS)
    expected = engine.decode_all(NEXT)
    decoded(engine, PARTS)
    engine.decode_all([8] * len(NEXT))
    engine.score([[5, 6], [7]])
    assert engine.truncate(122) == 120
    assert np.array_equal(engine.decode_all(NEXT), expected)


def test_tokens_are_dropped_once_per_step_and_then_back_to_before_it(undoing: Engine) -> None:
    decoded(undoing, PARTS)
    undoing.decode_all([5])
    expected = undoing.decode_all(NEXT)
    decoded(undoing, PARTS)
    undoing.decode_all([5])
    undoing.decode_all([8] * 16)
    assert undoing.truncate(123) == 123
    assert undoing.truncate(122) == 121
    assert np.array_equal(undoing.decode_all(NEXT), expected)


def test_more_tokens_than_an_engine_drops_are_dropped_to_before_the_step(engine: Engine) -> None:
    decoded(engine, PARTS)
    assert engine.max_rollback is not None
    # The last of these takes several batches.
    for tokens in (engine.max_rollback + 2, 40, 130):
        engine.decode_all([8] * tokens)
        assert engine.truncate(121) == 120


def test_what_convolutions_read_in_long_steps_takes_the_same_memory_with_all_adapters(
    files_of: Callable[[str, str], dict[str, Path]],
) -> None:
    files = files_of("onnx", "lfm2")
    with closing(OnnxEngine(files["base"], context_length=CONTEXT, threads=1)) as engine:
        for name in ("first", "second"):
            engine.load_adapter(name, files[name])
            engine.activate({name: 1.0})
            decoded(engine, PARTS)
        outputs = [one for sides in engine._bindings.values() for side in sides for one in side.io.get_outputs()]
        read = [one.data_ptr() for one in outputs if one.shape() == [1, 64, 40]]
        # Two layers, and the bindings of two sides for each adapter.
        assert (len(read), len({*read})) == (8, 1)


def test_a_restored_state_is_a_place_to_cut_to(engine: Engine) -> None:
    expected = decoded(engine, [*PARTS[:2], NEXT])
    decoded(engine, PARTS[:2])
    state = engine.save_state()
    decoded(engine, [[9] * 30])
    engine.restore_state(state)
    engine.decode(PARTS[2])
    engine.decode_all([5])
    assert engine.truncate(80) == 80
    assert np.array_equal(engine.decode(NEXT), expected)


def test_a_stopped_step_leaves_the_sequence_as_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ([*PARTS], [*PARTS, [5]], []):
        expected = decoded(engine, [*before, NEXT])
        engine.truncate(0)
        for part in before:
            engine.decode_all(part)
        with monkeypatch.context() as patch, pytest.raises(StepStopped):
            stop_next_step(engine, patch)
            engine.decode(NEXT)
        if isinstance(engine, GgufEngine):
            engine._stop.clear()
        np.testing.assert_allclose(engine.decode(NEXT), expected, atol=0.01)


def test_a_large_state_is_cut_to_before_the_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(engine, OnnxEngine):
        pytest.skip("llama.cpp keeps a state for each token")
    monkeypatch.setattr(needs, "ROLLBACK_BYTES", 1)
    with closing(engine.fork()) as large:
        assert large.max_rollback == 0
        expected = decoded(large, [*PARTS[:2], NEXT])
        decoded(large, PARTS[:2])
        large.decode_all(NEXT)
        assert large.truncate(83) == 80
        assert np.array_equal(large.decode(NEXT), expected)


def test_the_first_checkpoints_are_dropped_when_there_are_too_many(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS_BYTES", 1)
    with closing(engine.fork()) as small:
        decoded(small, PARTS)
        assert small.truncate(100) == 80
        decoded(small, PARTS)
        assert small.truncate(79) == 0


def test_many_short_parts_have_no_more_checkpoints_than_are_counted_as_memory(engine: Engine) -> None:
    decoded(engine, [[number] for number in range(100, 140)])
    kept = checkpoints.checkpoints_of(1, CONTEXT)
    assert [engine.truncate(40 - dropped) for dropped in range(1, kept + 1)] == [*range(39, 40 - kept, -1), 0]


def test_a_state_whose_recurrent_part_is_damaged_is_refused(engine: Engine) -> None:
    decoded(engine, PARTS)
    state = bytes(engine.save_state())
    expected = engine.decode(NEXT)
    damaged = [state[:-1], state + b"\0", state[:-600]]
    if isinstance(engine, GgufEngine):
        (position,) = (at for at in range(len(state) - 12) if state[at : at + 12] == struct.pack("<IiI", 1, 119, 0))
        damaged.append(state[: position + 4] + struct.pack("<i", 118) + state[position + 8 :])
    for broken in damaged:
        with pytest.raises(VerificationError, match="state"):
            engine.restore_state(memoryview(broken))
        assert engine.truncate(5) == 0
    engine.restore_state(memoryview(state))
    assert np.array_equal(engine.decode(NEXT), expected)


@pytest.mark.parametrize("method", ["keep", "end_run"])
def test_an_empty_sequence_has_nothing_of_what_an_interrupt_left(
    engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(engine._cache, method):
        pytest.skip("the engine has no such step")
    expected = decoded(engine, PARTS[:2])
    state, original = engine.save_state(), getattr(engine._cache, method)

    def interrupt(*arguments: object) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    for call in (lambda: engine.decode(PARTS[2]), lambda: engine.restore_state(state)):
        engine.truncate(0)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(engine._cache, method, interrupt)
            call()
        assert np.array_equal(decoded(engine, PARTS[:2]), expected)
