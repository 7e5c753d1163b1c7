"""Steps of several sequences at once: each row's logits are those of a step of its sequence alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from edgetune_export.adapters import shapes
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx.backend import write_adapter, write_base
from edgetune_export.backends.onnx.options import OnnxOptions
from edgetune_runtime import UsageError
from edgetune_runtime.engines.base import Batch, BatchSizes, StepStopped
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from edgetune_runtime.engines.trial import is_exact
from runtime.bundles import folded, low_rank, write_onnx_adapter
from runtime.shaped import random_prefix

Files = Callable[[str, str], dict[str, Path]]
Forks = list[OnnxEngine]
CONTEXT = 60
CLOSE = 0.3
"""How much logits may differ where the code for the processor rounds rows of a batch in another way."""
SIZES = BatchSizes(sequences=4, adapters=5, rank=4)
SETS: tuple[dict[str, float], ...] = (
    {},
    {"first": 1.0},
    {"second": 1.0},
    {"both": 1.0},
    {"first": 0.5, "second": -0.7},
    {"second": 0.3},
)


EXACT: dict[OnnxEngine, bool] = {}
"""Whether rows of a step have the bits of single steps, by the first engine; tried out before there are sequences."""


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
    with closing(OnnxEngine(base, context_length=CONTEXT, threads=1, batching=SIZES)) as engine:
        for name in ("first", "second", "both"):
            engine.load_adapter(name, files[name])
        EXACT[engine] = is_exact(batch_of(engine), SIZES.sequences)
        yield engine


@pytest.fixture
def forks(first: OnnxEngine) -> Iterator[Forks]:
    """Four sequences that can share steps."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(batch_of(first).sequence())) for _ in range(4)]


def batch_of(first: OnnxEngine) -> Batch:
    assert first.batch is not None
    return first.batch


def is_same(first: OnnxEngine, found: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit, if the batch is so on this processor."""
    close = np.array_equal if EXACT[first] else partial(np.allclose, atol=CLOSE)
    return bool(close(found, expected))


def together(first: OnnxEngine, forks: Sequence[OnnxEngine], tokens: Sequence[int]) -> list[np.ndarray]:
    """The logits of a step of these sequences."""
    assert all(map(batch_of(first).can_join, forks))
    return [logits[0] for logits in batch_of(first).decode(list(zip(forks, tokens, strict=True)))]


def test_random_steps_together_are_steps_alone(first: OnnxEngine, forks: Forks) -> None:
    rng = random.Random(0)
    with ExitStack() as stack:
        alone = [stack.enter_context(closing(first.fork())) for _ in forks]
        for _ in range(60):
            for pair in zip(forks, alone, strict=True):
                prompt = [rng.randrange(384) for _ in range(rng.randrange(1, 9))]
                adapters, keep = rng.choice(SETS), rng.randrange(CONTEXT - 10)
                for engine in pair if rng.random() < 0.3 else ():
                    engine.activate(adapters)
                    engine.truncate(keep)
                    engine.decode(prompt)
            rows = [row for row in rng.sample(range(4), rng.randrange(5)) if forks[row].truncate(CONTEXT) < CONTEXT]
            tokens = [rng.randrange(384) for _ in rows]
            found = together(first, [forks[row] for row in rows], tokens) if rows else []
            for row, token, logits in zip(rows, tokens, found, strict=True):
                assert is_same(first, logits, alone[row].decode([token]))


def test_sequences_go_on_alone_after_a_common_step(first: OnnxEngine, forks: Forks) -> None:
    for fork, adapters in zip(forks, SETS, strict=False):
        fork.activate(adapters)
        fork.decode([5, 6, 7])
    together(first, forks, [8, 9, 10, 11])
    scores = [fork.score([[12, 13], [14]]) for fork in forks]
    following = [fork.decode([12, 13]) for fork in forks]
    states = [fork.save_state() for fork in forks]
    for fork, token, score, state, logits in zip(forks, [8, 9, 10, 11], scores, states, following, strict=True):
        fork.truncate(0)
        fork.decode([5, 6, 7])
        fork.decode([token])
        assert is_same(first, np.array(fork.score([[12, 13], [14]])), np.array(score))
        assert is_same(first, fork.decode([12, 13]), logits)
        fork.restore_state(state)
        fork.truncate(4)
        assert is_same(first, fork.decode([12, 13]), logits)


def test_a_prefix_shares_steps(tiny_source: Callable[[str], Source], files_of: Files, tmp_path: Path) -> None:
    source, files = tiny_source("llama"), files_of("onnx", "llama")
    prefix = random_prefix(source.path, 6)
    write_adapter(prefix, files["base"], tmp_path / "prefix", base_fingerprint=source.fingerprint)
    with ExitStack() as stack:
        first = stack.enter_context(
            closing(OnnxEngine(files["base"], context_length=CONTEXT, threads=1, batching=SIZES))
        )
        first.load_adapter("prefix", tmp_path / "prefix")
        EXACT[first] = is_exact(batch_of(first), SIZES.sequences)
        forks = [stack.enter_context(closing(batch_of(first).sequence())) for _ in range(2)]
        for engine in (first, forks[0]):
            engine.activate({"prefix": 1.0})
            engine.decode([5, 6, 7])
        assert is_same(first, together(first, forks, [8, 9])[0], first.decode([8]))


def test_a_stopped_step_and_a_refused_one_leave_all_sequences_as_they_were(first: OnnxEngine, forks: Forks) -> None:
    for fork, adapters in zip(forks, SETS, strict=False):
        fork.activate(adapters)
        fork.decode([5, 6, 7])
    expected = together(first, forks, [8, 9, 10, 11])
    for fork in forks:
        fork.truncate(3)
        fork.decode([7])
        fork.truncate(3)
    with pytest.raises(UsageError, match="vocabulary"):
        together(first, forks, (8, 9, 10, 384))
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
                together(first, forks, [8, 9, 10, 11])
                for fork in forks:
                    fork.truncate(3)
    finally:
        over.set()
        thread.join()
    assert [fork.truncate(CONTEXT) for fork in forks] == [3] * 4
    assert all(map(partial(is_same, first), together(first, forks, [8, 9, 10, 11]), expected))


def test_a_closed_sequence_leaves_its_place_to_a_new_one(first: OnnxEngine, forks: Forks) -> None:
    for fork, adapters in zip(forks, SETS, strict=False):
        fork.activate(adapters)
        fork.decode([5, 6])
    expected = together(first, forks, [8, 9, 10, 11])
    forks[1].close()
    forks[1].close()
    for fork in forks:
        fork.truncate(2)
    rest = [forks[0], *forks[2:]]
    assert all(map(partial(is_same, first), together(first, rest, [8, 10, 11]), (expected[0], *expected[2:])))
    with closing(batch_of(first).sequence()) as new:
        with pytest.raises(UsageError, match="all 4 sequences of the batch are in use"):
            batch_of(first).sequence()
        new.activate({"second": 1.0})
        new.decode([5, 6])
        for fork in rest:
            fork.truncate(2)
        found = together(first, [*rest, new], [8, 10, 11, 10])
        assert all(map(partial(is_same, first), found, (expected[0], *expected[2:], expected[2])))


def test_scalings_are_not_shared(tiny_source: Callable[[str], Source], tmp_path: Path) -> None:
    source = tiny_source("llama")
    factors = {"model.layers.1.self_attn.o_proj": shapes.Scaling(np.full(64, 1.5, np.float32), "output")}
    scaling = shapes.Tensors("scaled", "ia3", factors, {})
    pairs = low_rank(source.path, seed=1)
    graph = write_base(source, tmp_path, [scaling, folded(source.path, pairs)])
    write_adapter(scaling, graph, tmp_path / "scaled", base_fingerprint=source.fingerprint)
    write_onnx_adapter(source, graph, tmp_path / "low_rank", pairs)
    with closing(OnnxEngine(graph, context_length=CONTEXT, threads=1, batching=SIZES)) as first:
        for name in ("scaled", "low_rank"):
            first.load_adapter(name, tmp_path / name)
        choices: tuple[dict[str, float], ...] = ({}, {"low_rank": 1}, {"scaled": 1}, {"scaled": 1, "low_rank": 1})
        assert list(map(batch_of(first).can_hold, choices)) == [True, True, False, False]
