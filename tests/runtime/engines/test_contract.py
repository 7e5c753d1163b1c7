"""What both engines of text generation do alike: logits, adapters, scores, sequences, states and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from close import Close
from edgetune_runtime import NotFoundError, Runtime, UsageError, VerificationError
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from runtime.bundles import HYBRIDS
from runtime.conftest import LABELS
from runtime.engines.conftest import log_p

Engine = GgufEngine | OnnxEngine
Open = Callable[..., Engine]
Files = Callable[[str, str], dict[str, Path]]
FEW = ("llama", "qwen2", "qwen3", "gemma3")
ENGINES: dict[str, type[Engine]] = {"gguf": GgufEngine, "onnx": OnnxEngine}
CONTEXT = 200
TEXT = "turn on the warm light in the kitchen and close the blind"
CLOSE: dict[type[Engine], float] = {GgufEngine: 0.03, OnnxEngine: 1e-4}
"""How much logits of one token differ with the batch it is in: llama.cpp keeps keys and values in 16 bits (up to 0.01),
onnxruntime takes sums in another order (up to 1e-5)."""


@contextmanager
def opened(backend: str, files: dict[str, Path], **options: int) -> Iterator[Engine]:
    """An engine with the adapters `first`, `second` and `both`."""
    with closing(ENGINES[backend](files["base"], **{"context_length": CONTEXT, "threads": 1, **options})) as engine:
        for name in ("first", "second", "both"):
            engine.load_adapter(name, files[name])
        yield engine


@pytest.fixture
def open_(files_of: Files) -> Iterator[Open]:
    """`open_(backend, arch, **options)`: such an engine."""
    with ExitStack() as stack:
        yield lambda backend, arch="llama", **options: stack.enter_context(
            opened(backend, files_of(backend, arch), **options)
        )


@pytest.fixture(
    scope="module",
    params=[*((backend, arch) for arch in (*FEW, "gemma4") for backend in ENGINES), *HYBRIDS],
    ids="-".join,
)
def engine(request: pytest.FixtureRequest, files_of: Files) -> Iterator[Engine]:
    """Each engine with each architecture. Tests share it, so each has to empty the sequence first."""
    with opened(request.param[0], files_of(*request.param)) as engine:
        yield engine


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llama(backend: str, open_: Open) -> Engine:
    """Each engine with a LLaMA."""
    return open_(backend)


def fresh(engine: Engine, adapters: dict[str, float], tokens: Sequence[int]) -> np.ndarray:
    engine.activate(adapters)
    engine.truncate(0)
    return engine.decode(tokens)


def close_to(expected: object, engine: Engine) -> object:
    return Close(expected, CLOSE[type(engine)])


@pytest.mark.parametrize("arch", [*FEW, "gemma4", "lfm2", "qwen35"])
def test_both_engines_compute_the_same_logits(arch: str, open_: Open) -> None:
    onnx, gguf = open_("onnx", arch), open_("gguf", arch)
    tokens = onnx.tokenizer.tokenize(TEXT)
    assert tokens == gguf.tokenizer.tokenize(TEXT)
    for adapters in ({}, {"first": 1.0}, {"first": 0.5, "second": -0.7}):
        assert fresh(onnx, adapters, tokens) == close_to(fresh(gguf, adapters, tokens), gguf)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_both_engines_give_the_same_scores_with_every_adapter(arch: str, both_of: Callable[[str], Path]) -> None:
    with ExitStack() as stack:
        onnx, gguf = (stack.enter_context(Runtime.open(both_of(arch), engine=name)) for name in ("onnx", "gguf"))
        for adapter in (None, "command", "tone", "whole", {"tone": 1.0, "command": -0.5}):
            found = (engine.classify(TEXT, LABELS, adapter=adapter, exact=True) for engine in (onnx, gguf))
            shares, expected = (each.probabilities for each in found)
            assert shares == pytest.approx(expected, abs=0.02)
            losses = [engine.negative_log_likelihood(TEXT, adapter=adapter) for engine in (onnx, gguf)]
            assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_switching_back_restores_the_first_logits(engine: Engine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    runs = [fresh(engine, adapters, tokens) for adapters in ({}, {"first": 1}, {"second": 1}, {}, {"first": 1})]
    assert np.array_equal(runs[0], runs[3])
    assert np.array_equal(runs[1], runs[4])
    assert np.abs(runs[0] - runs[1]).max() > 0.5
    assert np.abs(runs[1] - runs[2]).max() > 0.5


def test_the_sum_of_two_adapters_is_their_concatenation(engine: Engine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    both = fresh(engine, {"first": 1, "second": 1}, tokens)
    assert both == close_to(fresh(engine, {"both": 1}, tokens), engine)
    assert both == close_to(fresh(engine, {"second": 1, "first": 1}, tokens), engine)


def test_scale_zero_is_the_base_and_a_scale_scales(engine: Engine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    base = fresh(engine, {}, tokens)
    assert np.array_equal(base, fresh(engine, {"first": 0}, tokens))
    small, whole = (np.abs(fresh(engine, {"first": scale}, tokens) - base).max() for scale in (0.001, 1))
    assert 0 < small < whole / 10


def test_many_adapters_at_once_add_up(
    llama: Engine, backend: str, files_of: Callable[[str, str], dict[str, Path]]
) -> None:
    for number in range(16):
        llama.load_adapter(f"copy{number}", files_of(backend, "llama")["wide"])
    tokens = llama.tokenizer.tokenize(TEXT)
    many = fresh(llama, {f"copy{number}": 1 / 16 for number in range(16)}, tokens)
    assert many == close_to(fresh(llama, {"copy0": 1}, tokens), llama)


def test_a_name_loaded_twice_is_left_as_it_is(
    llama: Engine, backend: str, files_of: Callable[[str, str], dict[str, Path]]
) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)
    before = fresh(llama, {"first": 1}, tokens)
    llama.load_adapter("first", files_of(backend, "llama")["second"])
    assert np.array_equal(before, fresh(llama, {"first": 1}, tokens))


def test_an_unloaded_adapter_is_not_found_and_its_name_can_be_loaded_again(
    llama: Engine, backend: str, files_of: Callable[[str, str], dict[str, Path]]
) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)
    base, first, second = (fresh(llama, adapters, tokens) for adapters in ({}, {"first": 1}, {"second": 1}))
    with closing(llama.fork()) as other:
        assert np.array_equal(fresh(other, {"first": 1}, tokens), first)
        llama.unload_adapter("first")
        llama.unload_adapter("first")
        for engine in (llama, other):
            with pytest.raises(NotFoundError, match="'first' is not loaded"):
                engine.activate({"first": 1})
            assert np.array_equal(fresh(engine, {}, tokens), base)
        llama.load_adapter("first", files_of(backend, "llama")["second"])
        for engine in (llama, other):
            assert np.array_equal(fresh(engine, {"first": 1}, tokens), second)


def test_adapters_are_loaded_and_unloaded_while_other_engines_on_the_base_compute(
    llama: Engine, backend: str, files_of: Callable[[str, str], dict[str, Path]]
) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)[:8]
    expected = {name: fresh(llama, {name: 1}, tokens) for name in ("first", "second")}
    path = files_of(backend, "llama")["both"]

    def compute(engine: Engine) -> bool:
        runs = [(name, fresh(engine, {name: 1}, tokens)) for name in ("first", "second") * 40]
        return all(np.array_equal(logits, expected[name]) for name, logits in runs)

    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        forks = [stack.enter_context(closing(llama.fork())) for _ in range(3)]
        computing = [threads.submit(compute, fork) for fork in forks]
        while not all(run.done() for run in computing):
            llama.load_adapter("more", path)
            llama.activate({"more": 1})
            llama.unload_adapter("more")
        assert all(run.result() for run in computing)


def test_decode_all_gives_the_logits_that_decode_gives_token_by_token(engine: Engine) -> None:
    tokens = (engine.tokenizer.tokenize(TEXT) * 6)[:150]
    engine.activate({"first": 1})
    engine.truncate(0)
    rows = engine.decode_all(tokens)
    assert fresh(engine, {"first": 1}, tokens) == close_to(rows[-1], engine)
    engine.truncate(0)
    assert rows == close_to(np.array([engine.decode([token]) for token in tokens]), engine)


def test_returned_logits_are_not_overwritten(llama: Engine) -> None:
    one, rows = llama.decode([5, 6]), llama.decode_all([7, 8])
    copies = one.copy(), rows.copy()
    llama.score([[9, 10, 11], [12]])
    llama.decode([13])
    llama.decode_all([14] * 40)
    assert np.array_equal(one, copies[0])
    assert np.array_equal(rows, copies[1])


def test_a_prompt_longer_than_a_batch_gives_the_same_logits(llama: Engine) -> None:
    tokens = (llama.tokenizer.tokenize(TEXT) * 6)[:150]
    expected = fresh(llama, {}, tokens)
    llama.truncate(0)
    llama.decode(tokens[:70])
    assert llama.decode(tokens[70:]) == close_to(expected, llama)


def test_scores_are_the_sums_that_decode_all_gives(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    tokens = tokenizer.tokenize(TEXT)
    labels = ["red", "red light", "red lamp", "green", "warm kitchen light", "close the blind", "red light"]
    endings = [[*tokenizer.tokenize(label, continues=True), tokenizer.end_token] for label in labels]
    endings += [[], [7], [7, 8], [8]]
    fresh(engine, {"second": 0.7}, tokens)
    scores = engine.score(endings)
    for ending, score in zip(endings, scores, strict=True):
        engine.truncate(0)
        rows = log_p(engine.decode_all([*tokens, *ending]))
        expected = sum(rows[len(tokens) - 1 + place, token] for place, token in enumerate(ending))
        assert score == pytest.approx(expected, abs=1e-3)


def test_many_labels_get_the_scores_of_each_alone(llama: Engine) -> None:
    rng = np.random.default_rng(0)
    # Few tokens begin many labels, and there are more labels than llama.cpp has sequences.
    endings = [[int(token) for token in rng.integers(5, 40, rng.integers(1, 6))] for _ in range(200)]
    llama.decode(llama.tokenizer.tokenize(TEXT))
    together = llama.score(endings)
    assert together == close_to([llama.score([ending])[0] for ending in endings], llama)


def test_labels_are_scored_in_a_context_with_room_for_one_only(llama: Engine) -> None:
    endings = [[5 + number, 6, 7, 8, 9] for number in range(40)]
    llama.decode([5] * (CONTEXT - 5))
    scores = llama.score(endings)
    assert scores == close_to([llama.score([ending])[0] for ending in endings], llama)
    with pytest.raises(UsageError, match=f"195 tokens and 6 .* {CONTEXT}"):
        llama.score([[5] * 6])
    with pytest.raises(UsageError, match="vocabulary"):
        llama.score([[384]])


def test_scoring_leaves_the_sequence_as_it_was(engine: Engine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    expected = fresh(engine, {"first": 1}, [*tokens, 9])
    fresh(engine, {"first": 1}, tokens)
    first = engine.score([[9, 8, 7], [9, 8], [3]])
    assert engine.score([[9, 8, 7], [9, 8], [3]]) == first
    assert engine.decode([9]) == close_to(expected, engine)


def test_scoring_needs_logits(llama: Engine) -> None:
    with pytest.raises(UsageError, match="decode"):
        llama.score([[1]])
    llama.decode([5, 6, 7])
    llama.truncate(2)
    with pytest.raises(UsageError, match="decode"):
        llama.score([[1]])


@pytest.mark.parametrize("keep", [150, 100, 1])
def test_a_truncated_or_restored_sequence_continues_as_a_new_one(
    engine: Engine, keep: int, request: pytest.FixtureRequest
) -> None:
    # Longer than the sliding window of the Gemma base, which llama.cpp's saved states do not cover.
    tokens = (engine.tokenizer.tokenize(TEXT) * 20)[:150]
    other = [11, 12, 13]
    expected = fresh(engine, {"first": 1}, [*tokens[:keep], *other])
    fresh(engine, {"first": 1}, tokens)
    state = engine.save_state()
    is_cut, case = keep < len(tokens), request.node.callspec.params["engine"]
    kept = engine.truncate(keep)
    # Recurrent states are known at the ends of prompts only.
    assert kept == (0 if is_cut and case in HYBRIDS else keep)
    assert engine.decode([*tokens[kept:keep], *other]) == close_to(expected, engine)
    fresh(engine, {}, [9] * 20)
    engine.activate({"first": 1})
    engine.restore_state(state)
    kept = engine.truncate(keep)
    assert kept == (0 if is_cut and case in (("gguf", "gemma3"), ("gguf", "gemma4"), *HYBRIDS) else keep)
    assert engine.decode([*tokens[kept:keep], *other]) == close_to(expected, engine)
    assert engine.truncate(0) == 0


def test_truncating_to_more_tokens_than_there_are_changes_nothing(llama: Engine) -> None:
    expected = fresh(llama, {}, [5, 6, 7])
    fresh(llama, {}, [5, 6])
    assert llama.truncate(10) == 2
    assert llama.decode([7]) == close_to(expected, llama)


def test_bytes_that_are_no_state_are_refused(llama: Engine) -> None:
    llama.decode([5, 6])
    state = bytes(llama.save_state())
    expected = fresh(llama, {}, [5, 6, 7])
    for broken in (b"", b"\0" * 100, state[:-1], state + b"\0", b"ETS1\xff\xff\xff\xff"):
        with pytest.raises(VerificationError, match="state"):
            llama.restore_state(memoryview(broken))
        assert llama.truncate(5) == 0
    llama.restore_state(memoryview(state))
    assert llama.decode([7]) == close_to(expected, llama)


def test_a_state_longer_than_the_context_is_refused(llama: Engine, backend: str, open_: Open) -> None:
    llama.decode([5] * 40)
    with pytest.raises(VerificationError, match="state"):
        open_(backend, context_length=32).restore_state(llama.save_state())


def test_a_context_shorter_than_the_sliding_window_is_enough(backend: str, open_: Open) -> None:
    # The window of the Gemma base is 16.
    short, long = (open_(backend, "gemma3", context_length=length) for length in (8, CONTEXT))
    assert short.decode([5, 6, 7]) == close_to(long.decode([5, 6, 7]), long)


def test_a_fork_has_its_own_sequence_and_the_same_adapters(engine: Engine) -> None:
    tokens = [5, 6, 7, 8]
    expected = [fresh(engine, adapters, tokens) for adapters in ({"first": 1.0}, {})]
    with closing(engine.fork()) as other:
        other.activate({"first": 1.0})
        engine.activate({})
        engine.truncate(0)
        for token in tokens:
            logits = (other.decode([token]), engine.decode([token]))
        assert logits[0] == close_to(expected[0], engine)
        assert logits[1] == close_to(expected[1], engine)


def test_too_many_tokens_are_refused_with_both_lengths(llama: Engine) -> None:
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        llama.decode([5] * (CONTEXT + 1))
    llama.decode([5] * CONTEXT)
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        llama.decode_all([5])
    with pytest.raises(UsageError, match="no tokens"):
        llama.decode([])


@pytest.mark.parametrize("token", [-1, 384, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(llama: Engine, token: int) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        llama.decode([5, token])
    llama.decode([5])


def test_an_unknown_adapter_or_scale_is_refused_and_the_active_ones_stay(llama: Engine) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)
    expected = fresh(llama, {"first": 1}, tokens)
    with pytest.raises(NotFoundError, match="third"):
        llama.activate({"third": 1})
    with pytest.raises(UsageError, match="nan"):
        llama.activate({"first": float("nan")})
    llama.truncate(0)
    assert np.array_equal(llama.decode(tokens), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "positive"),
        ({"threads": 0}, "positive"),
        ({"threads": -3}, "positive"),
        ({"context_length": 513}, r"context_length 513 is more .*; give at most 512"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str, backend: str, open_: Open) -> None:
    with pytest.raises(UsageError, match=message):
        open_(backend, **options)


def test_closing_twice_is_no_error(llama: Engine) -> None:
    llama.close()
    llama.close()


def test_nothing_is_written_to_the_terminal(backend: str, open_: Open, capfd: pytest.CaptureFixture[str]) -> None:
    engine = open_(backend, context_length=32)
    fresh(engine, {"first": 1}, [5])
    engine.close()
    assert capfd.readouterr() == ("", "")
