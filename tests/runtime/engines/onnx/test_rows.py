"""Steps of several sequences at once: each row's logits are those of a step of its sequence alone, bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edgetune_export.adapters import shapes
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx.backend import write_adapter, write_base
from edgetune_export.backends.onnx.options import OnnxOptions
from edgetune_runtime import UsageError
from edgetune_runtime.engines.base import StepStopped
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from runtime.bundles import folded, low_rank, write_onnx_adapter
from runtime.shaped import random_prefix

Files = Callable[[str, str], dict[str, Path]]
Forks = list[OnnxEngine]
CONTEXT = 60
SETS: tuple[dict[str, float], ...] = (
    {},
    {"first": 1.0},
    {"second": 1.0},
    {"both": 1.0},
    {"first": 0.5, "second": -0.7},
    {"second": 0.3},
)


@pytest.fixture(params=["llama", "qwen3", "gemma3", "llama int8", "llama int4"])
def first(
    request: pytest.FixtureRequest, files_of: Files, tiny_source: Callable[[str], Source], tmp_path: Path
) -> Iterator[OnnxEngine]:
    """The first engine of a base, with the adapters `first` and `second`, of different ranks, and `both`."""
    arch, _, weights = request.param.partition(" ")
    files = files_of("onnx", arch)
    base = files["base"]
    if weights:
        source = replace(tiny_source(arch), options={"onnx": OnnxOptions(weights=weights)})
        base = write_base(source, tmp_path, [folded(source.path, low_rank(source.path, seed=1))])
    with closing(OnnxEngine(base, context_length=CONTEXT, threads=1)) as engine:
        for name in ("first", "second", "both"):
            engine.load_adapter(name, files[name])
        yield engine


@pytest.fixture
def forks(first: OnnxEngine) -> Iterator[Forks]:
    """Four sequences that can share steps."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(first.fork(streams=4))) for _ in range(4)]


def together(forks: Sequence[OnnxEngine], tokens: Sequence[int]) -> list[np.ndarray]:
    """A step of all forks, which must have the same key."""
    assert len({fork.step_key(1) for fork in forks} - {None}) == 1
    steps = [(fork, [token]) for fork, token in zip(forks, tokens, strict=True)]
    return [logits[0] for logits in forks[0].decode_together(steps)]


def test_random_steps_together_are_steps_alone(first: OnnxEngine, forks: Forks) -> None:
    rng = random.Random(0)
    with ExitStack() as stack:
        alone = [stack.enter_context(closing(first.fork())) for _ in forks]
        for _ in range(60):
            for pair in zip(forks, alone, strict=True):
                prompt = [rng.randrange(384) for _ in range(rng.randrange(1, 9))]
                adapters, keep = rng.choice(SETS), rng.randrange(CONTEXT - 10)
                if rng.random() < 0.3:
                    results = [
                        (engine.activate(adapters), engine.truncate(keep), engine.decode(prompt)) for engine in pair
                    ]
                    assert np.array_equal(results[0][2], results[1][2])
            rows = rng.sample(range(4), rng.randrange(1, 5))
            rows = [row for row in rows if forks[row].truncate(CONTEXT) < CONTEXT]
            tokens = [rng.randrange(384) for _ in rows]
            if rows:
                for row, token, logits in zip(
                    rows, tokens, together([forks[row] for row in rows], tokens), strict=True
                ):
                    assert np.array_equal(logits, alone[row].decode([token]))


def test_sequences_go_on_alone_after_a_common_step(forks: Forks) -> None:
    for fork, adapters in zip(forks, SETS, strict=False):
        fork.activate(adapters)
        fork.decode([5, 6, 7])
    together(forks, [8, 9, 10, 11])
    scores = [fork.score([[12, 13], [14]]) for fork in forks]
    states = [fork.save_state() for fork in forks]
    following = [fork.decode([12, 13]) for fork in forks]
    for fork, token, score, state, logits in zip(forks, [8, 9, 10, 11], scores, states, following, strict=True):
        fork.truncate(0)
        fork.decode([5, 6, 7])
        fork.decode([token])
        assert fork.score([[12, 13], [14]]) == score
        assert fork.save_state() == state
        assert np.array_equal(fork.decode([12, 13]), logits)


def test_a_prefix_shares_steps(tiny_source: Callable[[str], Source], files_of: Files, tmp_path: Path) -> None:
    source, files = tiny_source("llama"), files_of("onnx", "llama")
    prefix = random_prefix(source.path, 6)
    write_adapter(prefix, files["base"], tmp_path / "prefix", base_fingerprint=source.fingerprint)
    with ExitStack() as stack:
        first = stack.enter_context(closing(OnnxEngine(files["base"], context_length=CONTEXT, threads=1)))
        first.load_adapter("prefix", tmp_path / "prefix")
        forks = [stack.enter_context(closing(first.fork(streams=2))) for _ in range(2)]
        for engine in (first, forks[0]):
            engine.activate({"prefix": 1.0})
            engine.decode([5, 6, 7])
        assert np.array_equal(together(forks, [8, 9])[0], first.decode([8]))


def test_a_stopped_step_and_a_refused_one_leave_all_sequences_as_they_were(forks: Forks) -> None:
    for fork, adapters in zip(forks, SETS, strict=False):
        fork.activate(adapters)
        fork.decode([5, 6, 7])
    expected = together(forks, [8, 9, 10, 11])
    for fork in forks:
        fork.truncate(3)
        fork.decode([7])
        fork.truncate(3)
    with pytest.raises(UsageError, match="vocabulary"):
        forks[0].decode_together([(fork, [token]) for fork, token in zip(forks, (8, 9, 10, 384), strict=True)])
    assert [fork.truncate(CONTEXT) for fork in forks] == [3] * 4
    over = threading.Event()

    def stop() -> None:
        while not over.is_set():
            forks[0].stop_step()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(StepStopped):
            for _ in range(1000):
                together(forks, [8, 9, 10, 11])
                for fork in forks:
                    fork.truncate(3)
    finally:
        over.set()
        thread.join()
    assert [fork.truncate(CONTEXT) for fork in forks] == [3] * 4
    assert all(map(np.array_equal, together(forks, [8, 9, 10, 11]), expected))


def test_a_closed_sequence_leaves_its_place_to_a_new_one(first: OnnxEngine, forks: Forks) -> None:
    for fork, adapters in zip(forks, SETS, strict=False):
        fork.activate(adapters)
        fork.decode([5, 6])
    expected = together(forks, [8, 9, 10, 11])
    forks[1].close()
    forks[1].close()
    for fork in forks:
        fork.truncate(2)
    rest = [forks[0], *forks[2:]]
    assert all(map(np.array_equal, together(rest, [8, 10, 11]), (expected[0], *expected[2:])))
    with closing(first.fork(streams=4)) as new, closing(first.fork(streams=4)) as other:
        assert new.step_key(1) == forks[0].step_key(1) != other.step_key(1) is not None
        new.activate({"second": 1.0})
        new.decode([5, 6])
        for fork in rest:
            fork.truncate(2)
        found = together([*rest, new], [8, 10, 11, 10])
        assert all(map(np.array_equal, found, (expected[0], *expected[2:], expected[2])))


def test_steps_that_cannot_be_shared_have_no_key(first: OnnxEngine, forks: Forks) -> None:
    with closing(first.fork()) as alone:
        assert alone.step_key(1) is None
    assert first.step_key(1) is None
    assert forks[0].step_key(2) is None


def test_scalings_are_not_shared(tiny_source: Callable[[str], Source], tmp_path: Path) -> None:
    source = tiny_source("llama")
    factors = {"model.layers.1.self_attn.o_proj": shapes.Scaling(np.full(64, 1.5, np.float32), "output")}
    scaling = shapes.Tensors("scaled", "ia3", factors, {})
    pairs = low_rank(source.path, seed=1)
    graph = write_base(source, tmp_path, [scaling, folded(source.path, pairs)])
    write_adapter(scaling, graph, tmp_path / "scaled", base_fingerprint=source.fingerprint)
    write_onnx_adapter(source, graph, tmp_path / "low_rank", pairs)
    with closing(OnnxEngine(graph, context_length=CONTEXT, threads=1)) as first:
        for name in ("scaled", "low_rank"):
            first.load_adapter(name, tmp_path / name)
        with closing(first.fork(streams=2)) as fork:
            keys = []
            for adapters in ({}, {"low_rank": 1.0}, {"scaled": 1.0}, {"scaled": 1.0, "low_rank": 1.0}):
                fork.activate(adapters)
                keys.append(fork.step_key(1))
    assert keys[0] == keys[1] is not None
    assert keys[2:] == [None, None]
