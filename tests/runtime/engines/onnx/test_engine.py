from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx.backend import write_base
from edgetune_runtime import EdgetuneError, IncompatibleError, NotFoundError, Runtime, UsageError, VerificationError
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.engines.onnx import ort as _ort
from edgetune_runtime.engines.onnx.engine import OnnxEngine, model_version
from edgetune_runtime.formats.onnx_adapter import adapter_arrays
from edgetune_runtime.measuring import loaded_bundle
from runtime.bundles import (
    change_manifest,
    concatenated,
    folded,
    low_rank,
    write_adapter,
    write_manifest,
    write_onnx_adapter,
)
from runtime.conftest import LABELS, SYSTEM

Sources = Callable[[str], Source]
Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]
CONTEXT = 200
TEXT = "turn on the warm light in the kitchen and close the blind"
PROMPT = "turn on the warm light in the kitchen"
CLOSE = 1e-4
"""Logits of one token differ by up to 1e-5 with the batch it is in, as sums are taken in another order."""


@pytest.fixture(scope="module")
def files_of(tiny_source: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """The graph of an architecture as `base`, with adapters `first`, `second` and `both`, their sum as one."""

    @cache
    def make(arch: str) -> dict[str, Path]:
        source, folder = tiny_source(arch), tmp_path_factory.mktemp(f"engine-{arch}")
        first, second = low_rank(source.path, seed=1), low_rank(source.path, seed=2, rank=3)
        graph = write_base(source, folder, [folded(source.path, first)])
        pairs = {"first": first, "second": second, "both": concatenated(first, second)}
        files = {name: write_onnx_adapter(source, graph, folder / name, pair) for name, pair in pairs.items()}
        return {"base": graph, **files}

    return make


def opened(files: dict[str, Path], **options: int) -> OnnxEngine:
    engine = OnnxEngine(files["base"], **{"context_length": CONTEXT, "threads": 1, **options})
    for name in ("first", "second", "both"):
        engine.load_adapter(name, files[name])
    return engine


@pytest.fixture(params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest, files_of: Callable[[str], dict[str, Path]]) -> Iterator[OnnxEngine]:
    made = opened(files_of(request.param))
    yield made
    made.close()


@pytest.fixture
def llama(files_of: Callable[[str], dict[str, Path]]) -> Iterator[OnnxEngine]:
    made = opened(files_of("llama"))
    yield made
    made.close()


def fresh(engine: OnnxEngine | GgufEngine, adapters: dict[str, float], tokens: Sequence[int]) -> np.ndarray:
    engine.activate(adapters)
    engine.truncate(0)
    return engine.decode(tokens)


def log_p(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_the_logits_are_those_of_llama_cpp_with_the_same_adapters(
    engine: OnnxEngine, request: pytest.FixtureRequest, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_gguf(request.node.callspec.params["engine"])
    other = GgufEngine(base, context_length=CONTEXT, threads=1)
    for name, seed, rank in (("first", 1, 4), ("second", 2, 3)):
        other.load_adapter(name, write_adapter(base, tmp_path / name, low_rank(base, seed=seed, rank=rank)))
    tokens = engine.tokenizer.tokenize(TEXT)
    assert tokens == other.tokenizer.tokenize(TEXT)
    for adapters in ({}, {"first": 1.0}, {"first": 0.5, "second": -0.7}):
        # llama.cpp keeps keys and values in 16 bits.
        assert fresh(engine, adapters, tokens) == pytest.approx(fresh(other, adapters, tokens), abs=0.03)
    other.close()


def test_switching_back_restores_the_first_logits(engine: OnnxEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    runs = [fresh(engine, adapters, tokens) for adapters in ({}, {"first": 1}, {"second": 1}, {}, {"first": 1})]
    assert np.array_equal(runs[0], runs[3])
    assert np.array_equal(runs[1], runs[4])
    assert np.abs(runs[0] - runs[1]).max() > 0.5
    assert np.abs(runs[1] - runs[2]).max() > 0.5


def test_the_sum_of_two_adapters_is_their_concatenation(engine: OnnxEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    both = fresh(engine, {"first": 1, "second": 1}, tokens)
    assert both == pytest.approx(fresh(engine, {"both": 1}, tokens), abs=CLOSE)
    assert both == pytest.approx(fresh(engine, {"second": 1, "first": 1}, tokens), abs=CLOSE)


def test_scale_zero_is_the_base_and_a_scale_scales(engine: OnnxEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    base = fresh(engine, {}, tokens)
    assert np.array_equal(base, fresh(engine, {"first": 0}, tokens))
    small, whole = (np.abs(fresh(engine, {"first": scale}, tokens) - base).max() for scale in (0.001, 1))
    assert 0 < small < whole / 10


def test_many_sets_of_adapters_in_turn_keep_their_answers(
    llama: OnnxEngine, files_of: Callable[[str], dict[str, Path]]
) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)
    scales = [number / 50 for number in range(1, 51)]
    first = [fresh(llama, {"first": scale}, tokens) for scale in scales]
    again = [fresh(llama, {"first": scale}, tokens) for scale in scales]
    assert np.array_equal(first, again)
    assert np.array_equal(fresh(opened(files_of("llama")), {"first": scales[3]}, tokens), first[3])


def test_a_name_loaded_twice_is_left_as_it_is(llama: OnnxEngine, files_of: Callable[[str], dict[str, Path]]) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)
    before = fresh(llama, {"first": 1}, tokens)
    llama.load_adapter("first", files_of("llama")["second"])
    assert np.array_equal(before, fresh(llama, {"first": 1}, tokens))


def test_decode_all_gives_the_logits_that_decode_gives_token_by_token(engine: OnnxEngine) -> None:
    tokens = (engine.tokenizer.tokenize(TEXT) * 6)[:150]
    engine.activate({"first": 1})
    engine.truncate(0)
    rows = engine.decode_all(tokens)
    assert fresh(engine, {"first": 1}, tokens) == pytest.approx(rows[-1], abs=CLOSE)
    engine.truncate(0)
    assert rows == pytest.approx(np.array([engine.decode([token]) for token in tokens]), abs=CLOSE)


def test_logits_that_were_given_out_stay_as_they_are(llama: OnnxEngine) -> None:
    one, rows = llama.decode([5, 6]), llama.decode_all([7, 8])
    copies = one.copy(), rows.copy()
    llama.score([[9, 10, 11], [12]])
    llama.decode([13])
    llama.decode_all([14] * 40)
    assert np.array_equal(one, copies[0])
    assert np.array_equal(rows, copies[1])


def test_a_prompt_longer_than_a_batch_gives_the_same_logits(
    llama: OnnxEngine, files_of: Callable[[str], dict[str, Path]]
) -> None:
    small = opened(files_of("llama"), batch=8)
    tokens = llama.tokenizer.tokenize(TEXT)
    assert len(tokens) > 8
    assert small.decode(tokens) == pytest.approx(llama.decode(tokens), abs=CLOSE)
    small.truncate(0)
    llama.truncate(0)
    assert small.decode_all(tokens) == pytest.approx(llama.decode_all(tokens), abs=CLOSE)
    small.close()


def test_scores_are_the_sums_that_decode_all_gives(engine: OnnxEngine) -> None:
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


def test_many_labels_are_scored_as_each_alone(llama: OnnxEngine) -> None:
    rng = np.random.default_rng(0)
    endings = [[int(token) for token in rng.integers(5, 40, rng.integers(1, 6))] for _ in range(60)]
    llama.decode(llama.tokenizer.tokenize(TEXT))
    together = llama.score(endings)
    assert together == pytest.approx([llama.score([ending])[0] for ending in endings], abs=CLOSE)


def test_a_label_that_fills_the_context_is_scored_and_a_longer_one_refused(llama: OnnxEngine) -> None:
    llama.decode([5] * (CONTEXT - 5))
    assert len(llama.score([[6] * 5, [7]])) == 2
    with pytest.raises(UsageError, match=f"195 tokens and 6 .* {CONTEXT}"):
        llama.score([[5] * 6])
    with pytest.raises(UsageError, match="vocabulary"):
        llama.score([[384]])


def test_scoring_leaves_the_sequence_as_it_was(engine: OnnxEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    expected = fresh(engine, {"first": 1}, [*tokens, 9])
    fresh(engine, {"first": 1}, tokens)
    first = engine.score([[9, 8, 7], [9, 8], [3]])
    assert engine.score([[9, 8, 7], [9, 8], [3]]) == first
    assert engine.decode([9]) == pytest.approx(expected, abs=CLOSE)


def test_scoring_needs_logits(llama: OnnxEngine) -> None:
    with pytest.raises(UsageError, match="decode"):
        llama.score([[1]])
    llama.decode([5, 6, 7])
    llama.truncate(2)
    with pytest.raises(UsageError, match="decode"):
        llama.score([[1]])


def test_a_sequence_trimmed_or_restored_goes_on_as_if_new(engine: OnnxEngine) -> None:
    # Longer than the sliding window of the Gemma base.
    tokens = (engine.tokenizer.tokenize(TEXT) * 20)[:150]
    other = [11, 12, 13]
    expected = {keep: fresh(engine, {"first": 1}, [*tokens[:keep], *other]) for keep in (150, 100, 1)}
    fresh(engine, {"first": 1}, tokens)
    state = engine.save_state()
    for keep in (150, 100, 1):
        fresh(engine, {"first": 1}, tokens)
        assert engine.truncate(keep) == keep
        assert engine.decode(other) == pytest.approx(expected[keep], abs=CLOSE)
        fresh(engine, {}, [9] * 20)
        engine.activate({"first": 1})
        engine.restore_state(state)
        assert engine.truncate(keep) == keep
        assert engine.decode(other) == pytest.approx(expected[keep], abs=CLOSE)
        assert engine.truncate(0) == 0


def test_forgetting_more_than_there_is_changes_nothing(llama: OnnxEngine) -> None:
    expected = fresh(llama, {}, [5, 6, 7])
    fresh(llama, {}, [5, 6])
    assert llama.truncate(10) == 2
    assert llama.decode([7]) == pytest.approx(expected, abs=CLOSE)


def test_what_is_no_state_is_refused_and_the_engine_goes_on(llama: OnnxEngine) -> None:
    llama.decode([5, 6])
    state = bytes(llama.save_state())
    for broken in (b"", b"\0" * 100, state[:-1], state + b"\0", b"ETS1\xff\xff\xff\xff"):
        with pytest.raises(VerificationError, match="state"):
            llama.restore_state(memoryview(broken))
        assert llama.truncate(5) == 0
    expected = fresh(llama, {}, [5, 6, 7])
    llama.restore_state(memoryview(state))
    assert llama.decode([7]) == pytest.approx(expected, abs=CLOSE)


def test_a_state_longer_than_the_context_is_refused(
    llama: OnnxEngine, files_of: Callable[[str], dict[str, Path]]
) -> None:
    llama.decode([5] * 40)
    with pytest.raises(VerificationError, match="state"):
        opened(files_of("llama"), context_length=32).restore_state(llama.save_state())


def test_tokens_that_do_not_fit_are_told_with_both_lengths(llama: OnnxEngine) -> None:
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        llama.decode([5] * (CONTEXT + 1))
    llama.decode([5] * CONTEXT)
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        llama.decode_all([5])
    with pytest.raises(UsageError, match="no tokens"):
        llama.decode([])


@pytest.mark.parametrize("token", [-1, 384, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(llama: OnnxEngine, token: int) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        llama.decode([5, token])
    llama.decode([5])


def test_an_adapter_that_is_not_loaded_or_a_scale_that_is_no_number_is_refused(llama: OnnxEngine) -> None:
    tokens = llama.tokenizer.tokenize(TEXT)
    expected = fresh(llama, {"first": 1}, tokens)
    with pytest.raises(NotFoundError, match="third"):
        llama.activate({"third": 1})
    with pytest.raises(UsageError, match="nan"):
        llama.activate({"first": float("nan")})
    # What was active stays so.
    llama.truncate(0)
    assert np.array_equal(llama.decode(tokens), expected)


@pytest.mark.parametrize("options", [{"context_length": 0}, {"threads": 0}, {"batch": 0}, {"threads": -3}])
def test_options_that_cannot_be_are_refused(
    options: dict[str, int], files_of: Callable[[str], dict[str, Path]]
) -> None:
    with pytest.raises(UsageError, match="positive"):
        OnnxEngine(files_of("llama")["base"], **{"context_length": 32, **options})


def test_a_context_longer_than_the_base_was_trained_for_is_refused(
    files_of: Callable[[str], dict[str, Path]],
) -> None:
    with pytest.raises(UsageError, match=r"context_length 513 is more .*; give at most 512"):
        OnnxEngine(files_of("llama")["base"], context_length=513)


def test_a_context_shorter_than_the_sliding_window_is_enough(files_of: Callable[[str], dict[str, Path]]) -> None:
    # The window of the Gemma base is 16.
    short, long = (opened(files_of("gemma3"), context_length=length) for length in (8, CONTEXT))
    assert short.decode([5, 6, 7]) == pytest.approx(long.decode([5, 6, 7]), abs=CLOSE)


def test_closing_twice_is_no_error(llama: OnnxEngine) -> None:
    llama.close()
    llama.close()


def test_nothing_is_written_to_the_terminal(
    files_of: Callable[[str], dict[str, Path]], capfd: pytest.CaptureFixture[str]
) -> None:
    engine = opened(files_of("llama"), context_length=32)
    fresh(engine, {"first": 1}, [5])
    engine.close()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(params=["llama", "gemma3"])
def runtimes(request: pytest.FixtureRequest, both_of: Callable[[str], Path]) -> Iterator[tuple[Runtime, Runtime]]:
    """One bundle in onnxruntime and in llama.cpp."""
    bundle = both_of(request.param)
    with Runtime.open(bundle, engine="onnx") as first, Runtime.open(bundle, engine="gguf") as second:
        yield first, second


@pytest.fixture
def runtime(both_of: Callable[[str], Path]) -> Iterator[Runtime]:
    with Runtime.open(both_of("llama"), engine="onnx", exact=False) as opened:
        yield opened


def test_both_engines_tell_the_same_of_every_adapter(runtimes: tuple[Runtime, Runtime]) -> None:
    labels = LABELS[:3]
    for adapter in (None, "command", "tone", "whole", {"tone": 1.0, "command": -0.5}):
        ours, theirs = (runtime.classify(PROMPT, labels, adapter=adapter)[1] for runtime in runtimes)
        assert ours == pytest.approx(theirs, abs=0.02)
        losses = [runtime.negative_log_likelihood(TEXT, adapter=adapter) for runtime in runtimes]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_an_answer_says_what_it_took_and_switching_back_restores_it(runtime: Runtime) -> None:
    first = runtime.generate(PROMPT, adapter="command", max_tokens=8)
    other = runtime.generate(PROMPT, adapter="tone", max_tokens=8)
    base = runtime.generate(PROMPT, max_tokens=8)
    again = runtime.generate(PROMPT, adapter="command", max_tokens=8)
    assert first.text == again.text
    assert len({first.text, other.text, base.text}) == 3
    assert first.timings.reused_tokens == 0
    assert again.timings.reused_tokens == again.timings.prompt_tokens - 1
    runtime.clear_cache()
    assert runtime.generate(PROMPT, max_tokens=8).text == base.text
    assert runtime.generate(PROMPT, adapter={"tone": 0.0}, max_tokens=8).text == base.text
    # It is a copy of the base here.
    assert runtime.generate(PROMPT, adapter="whole", max_tokens=8).text == base.text


def test_the_adapters_system_prompt_is_used(runtime: Runtime) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
    given = runtime.generate(messages, adapter="command", max_tokens=4)
    assert given.text == runtime.generate(PROMPT, adapter="command", max_tokens=4).text


def test_a_merged_adapter_cannot_be_scaled_or_added(runtime: Runtime) -> None:
    with pytest.raises(IncompatibleError, match="merged"):
        runtime.generate(PROMPT, adapter={"whole": 1, "tone": 1})


def test_a_stream_gives_whole_characters_and_the_text_of_generate(runtime: Runtime) -> None:
    # At this temperature byte tokens come, single and in the middle of a character.
    options = {"adapter": "tone", "max_tokens": 60, "temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for seed in range(4):
        answer = runtime.generate(PROMPT, seed=seed, **options)
        stream = runtime.stream(PROMPT, seed=seed, **options)
        pieces = list(stream)
        assert "".join(pieces) == answer.text
        assert stream.answer is not None
        assert stream.answer.tokens == answer.tokens
        assert all(piece.encode() for piece in pieces)


def test_a_character_of_several_tokens_comes_out_whole(runtime: Runtime) -> None:
    tokenizer = loaded_bundle(runtime).context()[0].engine.tokenizer
    tokens = tokenizer.tokenize("23 °C 🙂 ok", continues=True)
    assert len(tokenizer.tokenize("🙂", continues=True)) >= 4
    assert b"".join(map(tokenizer.piece, tokens)).decode() == "23 °C 🙂 ok"


def test_classify_gives_probabilities_over_the_adapters_labels(runtime: Runtime) -> None:
    label, scores = runtime.classify(PROMPT, adapter="tone")
    assert tuple(scores) == LABELS
    assert sum(scores.values()) == pytest.approx(1)
    assert scores[label] == max(scores.values())
    some = runtime.classify(PROMPT, ["red", "green"], adapter="tone")[1]
    assert some["red"] / some["green"] == pytest.approx(scores["red"] / scores["green"], rel=1e-3)


def test_the_first_format_of_a_bundle_is_the_default(both_of: Callable[[str], Path], tmp_path: Path) -> None:
    with Runtime.open(both_of("llama")) as runtime:
        assert isinstance(loaded_bundle(runtime).context()[0].engine, GgufEngine)
    copy = Path(shutil.copytree(both_of("llama"), tmp_path / "copy"))
    change_manifest(copy, lambda raw: raw["base"]["files"].pop("gguf"))
    with Runtime.open(copy) as runtime:
        assert isinstance(loaded_bundle(runtime).context()[0].engine, OnnxEngine)


def test_a_bundle_without_onnx_says_what_it_has(bundle: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"no file for engine 'onnx'.*gguf"):
        Runtime.open(bundle, engine="onnx")


# --- What is spoilt is refused in one line.


def sign(copy: Path) -> None:
    """Bring the manifest's digests up to date, as somebody who spoils a bundle on purpose would."""
    manifest = read_manifest(copy)
    write_manifest(copy, manifest.base, manifest.adapters)


@pytest.fixture
def copy(both_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the bundle to spoil."""
    return Path(shutil.copytree(both_of("llama"), tmp_path / "copy"))


def refused(bundle: Path, *, verify: bool = True) -> EdgetuneError:
    with pytest.raises(EdgetuneError) as caught:
        Runtime.open(bundle, engine="onnx", verify=verify)
    assert "\n" not in str(caught.value)
    assert caught.value.__class__ is not EdgetuneError
    return caught.value


@pytest.mark.parametrize(
    "file",
    [
        "base/onnx/model.onnx",
        "base/onnx/model.onnx.data",
        "base/onnx/tokenizer.json",
        "base/onnx/tokenizer_config.json",
        "base/onnx/genai_config.json",
        "adapters/tone/adapter.onnx_adapter",
    ],
)
def test_a_flipped_bit_is_refused_before_the_file_is_read(copy: Path, file: str) -> None:
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 4
    (copy / file).write_bytes(data)
    error = refused(copy)
    assert isinstance(error, VerificationError)
    assert f"{file} does not match its digest" in str(error)


def test_a_changed_merged_model_is_refused_when_it_is_used(copy: Path) -> None:
    path = copy / "adapters/whole/onnx/model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with Runtime.open(copy, engine="onnx") as runtime:
        with pytest.raises(VerificationError, match="whole"):
            runtime.generate(PROMPT, adapter="whole")
        assert runtime.generate(PROMPT, max_tokens=1).tokens == 1


def test_flipped_bits_of_an_adapter_without_digests_are_refused_or_harmless(
    files_of: Callable[[str], dict[str, Path]], tiny_source: Sources, tmp_path: Path
) -> None:
    files, fingerprint = files_of("llama"), tiny_source("llama").fingerprint
    data, rng = files["first"].read_bytes(), random.Random(0)
    # All about the tensors lies before the numbers, and some behind.
    places = [*range(200), *(rng.randrange(len(data)) for _ in range(200)), *range(len(data) - 200, len(data))]
    engine, loaded = OnnxEngine(files["base"], context_length=32, threads=1), 0
    for number, place in enumerate(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped"
        path.write_bytes(flipped)
        try:
            engine.load_adapter(str(number), path, fingerprint)
        except (VerificationError, IncompatibleError) as error:
            assert "\n" not in str(error)
        else:
            # A flipped exponent may give numbers that are too large to compute with, but nothing worse.
            loaded += 1
            assert fresh(engine, {str(number): 1.0}, [5, 6]).shape == (384,)
    assert 100 < loaded < len(places)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"TAAD", bytes(range(256)) * 8])
def test_what_is_no_adapter_is_refused(data: bytes, copy: Path) -> None:
    (copy / "adapters/tone/adapter.onnx_adapter").write_bytes(data)
    error = refused(copy, verify=False)
    assert isinstance(error, VerificationError)
    assert "'tone'" in str(error)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], version: int) -> None:
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(version)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for name, tensor in tensors.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))


A = "model.layers.1.mlp.down_proj.lora_A.weight"
B = "model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda t: {k: v for k, v in t.items() if k != B}, VerificationError, "has no lora_B"),
        (lambda t: {k: v for k, v in t.items() if k != A}, VerificationError, "has no lora_A"),
        (lambda t: {}, VerificationError, "no tensors"),
        (lambda t: {**t, "model.layers.9.q.lora_A.weight": t[A]}, IncompatibleError, "unknown slot"),
        (lambda t: {**t, A: t[A][:-1].copy()}, IncompatibleError, r"shapes \(127, 3\)"),
        (lambda t: {**t, A: t[A][:, :-1].copy()}, VerificationError, "rank 2 in A and 3 in B"),
        (lambda t: {**t, A: t[A].astype(np.float64)}, VerificationError, "float64"),
        (lambda t: {**t, A: np.full_like(t[A], np.nan)}, VerificationError, "not finite"),
        (lambda t: {**t, A: t[A].reshape(-1)}, VerificationError, "not matrices"),
    ],
)
def test_an_adapter_that_contradicts_itself_or_the_graph_is_named(
    change: Change, kind: type[EdgetuneError], named: str, copy: Path
) -> None:
    path, fingerprint = copy / "adapters/tone/adapter.onnx_adapter", read_manifest(copy).base.fingerprint
    tensors, version = adapter_arrays(path, "tone")
    assert version == model_version(fingerprint)
    write_tensors(path, change(tensors), version)
    sign(copy)
    with pytest.raises(kind, match=f"adapter 'tone' .*{named}") as caught:
        Runtime.open(copy, engine="onnx")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(copy: Path) -> None:
    path = copy / "adapters/tone/adapter.onnx_adapter"
    tensors, version = adapter_arrays(path, "tone")
    write_tensors(path, tensors, version ^ 1)
    sign(copy)
    error = refused(copy)
    assert isinstance(error, IncompatibleError)
    assert "'tone' was made for another base" in str(error)


def test_a_graph_of_another_base_is_refused(copy: Path) -> None:
    path = copy / "base/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == "edgetune.base_fingerprint").value = "0" * 64
    onnx.save(model, path)
    sign(copy)
    assert "is not the base" in str(refused(copy))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("location", ["../../../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "link"])
def test_weights_outside_the_bundle_are_refused(location: str, verify: bool, copy: Path) -> None:
    path = copy / "base/onnx/model.onnx"
    shutil.copy(copy / "base/onnx/model.onnx.data", copy.parent / "secret")
    (copy / "base/onnx/link").symlink_to(copy.parent / "secret")
    model = onnx.load(path, load_external_data=False)
    entry = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(pair for pair in entry.external_data if pair.key == "location").value = location
    onnx.save(model, path)
    (copy / "base/onnx/link").unlink()
    sign(copy)
    (copy / "base/onnx/link").symlink_to(copy.parent / "secret")
    error = refused(copy, verify=verify)
    assert isinstance(error, VerificationError)


def test_weights_that_the_manifest_does_not_list_are_refused(copy: Path) -> None:
    change_manifest(copy, lambda raw: raw["files"].pop("base/onnx/model.onnx.data"))
    assert "no digest for base/onnx/model.onnx.data" in str(refused(copy))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "genai_config.json", "model.onnx.data"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(file: str, verify: bool, copy: Path) -> None:
    (copy / "base/onnx" / file).unlink()
    assert file in str(refused(copy, verify=verify))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"context_length": "x", "decoder": {}}}', "\xff"])
def test_a_damaged_config_is_refused(text: str, copy: Path) -> None:
    (copy / "base/onnx/genai_config.json").write_text(text, encoding="latin-1")
    assert isinstance(refused(copy, verify=False), VerificationError)


def test_a_cut_off_graph_is_refused_even_without_digests(copy: Path) -> None:
    for file in ("model.onnx.data", "model.onnx"):
        path = copy / "base/onnx" / file
        path.write_bytes(path.read_bytes()[:-5000])
        assert isinstance(refused(copy, verify=False), VerificationError)


def test_a_sound_graph_that_onnxruntime_refuses_is_told_in_one_line(copy: Path) -> None:
    path = copy / "base/onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[5].op_type = "NoSuchOperator"
    onnx.save(model, path)
    sign(copy)
    error = refused(copy)
    assert isinstance(error, VerificationError)
    assert "NoSuchOperator" in str(error)


@pytest.fixture
def another_onnxruntime() -> Iterator[None]:
    """Lets the test change what `library` finds."""
    _ort.library.cache_clear()
    yield
    _ort.library.cache_clear()


@pytest.mark.usefixtures("another_onnxruntime")
def test_an_onnxruntime_that_is_too_old_is_told_with_the_oldest_that_works(
    both_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    error = refused(both_of("llama"))
    assert isinstance(error, IncompatibleError)
    assert "onnxruntime 1.20.1 is too old, 1.31 or newer" in str(error)
    assert 'pip install --upgrade "edgetune-runtime[onnx]"' in str(error)


@pytest.mark.usefixtures("another_onnxruntime")
@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_a_missing_library_is_told_with_what_to_install(
    package: str, both_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(both_of("llama"))
    assert isinstance(error, IncompatibleError)
    assert f"need {package}, which is not installed" in str(error)
    assert '"edgetune-runtime[onnx]"' in str(error)
