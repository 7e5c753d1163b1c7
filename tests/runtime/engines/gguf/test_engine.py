from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from edgetune_runtime import IncompatibleError, NotFoundError, UsageError, VerificationError
from edgetune_runtime.engines.gguf.engine import BRANCHES, GgufEngine, GgufTokenizer
from edgetune_runtime.engines.gguf.llama import library
from runtime.bundles import concatenated, low_rank, write_adapter

Gguf = Callable[[str], Path]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]
CONTEXT = 200
TEXT = "turn on the warm light in the kitchen and close the blind"
CLOSE = 0.03
"""Logits of one token differ by up to 0.01 with the batch it is in, as keys and values are kept in 16 bits."""


def opened(base: Path, folder: Path, **options: int) -> GgufEngine:
    engine = GgufEngine(base, **{"context_length": CONTEXT, "threads": 1, **options})
    first, second = low_rank(base, seed=1), low_rank(base, seed=2, rank=3)
    for name, pairs in (("first", first), ("second", second), ("both", concatenated(first, second))):
        engine.load_adapter(name, write_adapter(base, folder / f"{name}.gguf", pairs))
    return engine


@pytest.fixture(params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest, tiny_gguf: Gguf, tmp_path: Path) -> Iterator[GgufEngine]:
    """Each architecture with adapters `first`, `second` and `both`, their sum as one."""
    made = opened(tiny_gguf(request.param), tmp_path)
    yield made
    made.close()


@pytest.fixture
def llama(tiny_gguf: Gguf, tmp_path: Path) -> Iterator[GgufEngine]:
    made = opened(tiny_gguf("llama"), tmp_path)
    yield made
    made.close()


def fresh(engine: GgufEngine, adapters: dict[str, float], tokens: Sequence[int]) -> np.ndarray:
    engine.activate(adapters)
    engine.truncate(0)
    return engine.decode(tokens)


def log_p(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_switching_back_restores_the_first_logits(engine: GgufEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    runs = [fresh(engine, adapters, tokens) for adapters in ({}, {"first": 1}, {"second": 1}, {}, {"first": 1})]
    assert np.array_equal(runs[0], runs[3])
    assert np.array_equal(runs[1], runs[4])
    assert np.abs(runs[0] - runs[1]).max() > 0.5
    assert np.abs(runs[1] - runs[2]).max() > 0.5


def test_the_sum_of_two_adapters_is_their_concatenation(engine: GgufEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    both = fresh(engine, {"first": 1, "second": 1}, tokens)
    assert both == pytest.approx(fresh(engine, {"both": 1}, tokens), abs=CLOSE)
    assert both == pytest.approx(fresh(engine, {"second": 1, "first": 1}, tokens), abs=CLOSE)


def test_scale_zero_is_the_base_and_a_scale_scales(engine: GgufEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    base = fresh(engine, {}, tokens)
    assert np.array_equal(base, fresh(engine, {"first": 0}, tokens))
    small, whole = (np.abs(fresh(engine, {"first": scale}, tokens) - base).max() for scale in (0.001, 1))
    assert 0 < small < whole / 10


def test_many_adapters_at_once_add_up(llama: GgufEngine, tiny_gguf: Gguf, tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    modules = ("attn_q", "attn_v", "ffn_up", "ffn_down")
    everywhere = [f"blk.{layer}.{module}.weight" for layer in (0, 1) for module in modules]
    path = write_adapter(base, tmp_path / "small.gguf", low_rank(base, 5, 2, everywhere, 0.1))
    for number in range(16):
        llama.load_adapter(f"copy{number}", path)
    tokens = llama.tokenizer.tokenize(TEXT)
    many = fresh(llama, {f"copy{number}": 1 / 16 for number in range(16)}, tokens)
    assert many == pytest.approx(fresh(llama, {"copy0": 1}, tokens), abs=CLOSE)


def test_decode_all_gives_the_logits_that_decode_gives_token_by_token(engine: GgufEngine) -> None:
    tokens = (engine.tokenizer.tokenize(TEXT) * 3)[: BRANCHES + 10]
    engine.activate({"first": 1})
    engine.truncate(0)
    rows = engine.decode_all(tokens)
    engine.truncate(0)
    assert rows == pytest.approx(np.array([engine.decode([token]) for token in tokens]), abs=CLOSE)


def test_a_prompt_longer_than_a_batch_gives_the_same_logits(llama: GgufEngine, tiny_gguf: Gguf, tmp_path: Path) -> None:
    small = opened(tiny_gguf("llama"), tmp_path, batch=8)
    tokens = llama.tokenizer.tokenize(TEXT)
    assert len(tokens) > 8
    assert small.decode(tokens) == pytest.approx(llama.decode(tokens), abs=CLOSE)
    small.truncate(0)
    llama.truncate(0)
    assert small.decode_all(tokens) == pytest.approx(llama.decode_all(tokens), abs=CLOSE)
    small.close()


def test_scores_are_the_sums_that_decode_all_gives(engine: GgufEngine) -> None:
    tokenizer = engine.tokenizer
    tokens = tokenizer.tokenize(TEXT)
    labels = ["red", "red light", "red lamp", "green", "warm kitchen light", "close the blind", "red light"]
    endings = [[*tokenizer.tokenize(label, continues=True), tokenizer.end_token] for label in labels]
    endings += [[], [7], [7, 8]]
    fresh(engine, {"second": 0.7}, tokens)
    scores = engine.score(endings)
    for ending, score in zip(endings, scores, strict=True):
        engine.truncate(0)
        rows = log_p(engine.decode_all([*tokens, *ending]))
        expected = sum(rows[len(tokens) - 1 + place, token] for place, token in enumerate(ending))
        assert score == pytest.approx(expected, abs=1e-3)


def test_more_labels_than_branches_are_scored_as_each_alone(llama: GgufEngine) -> None:
    rng = np.random.default_rng(0)
    endings = [[int(token) for token in rng.integers(5, 300, rng.integers(1, 6))] for _ in range(3 * BRANCHES)]
    llama.decode(llama.tokenizer.tokenize(TEXT))
    together = llama.score(endings)
    alone = [llama.score([ending])[0] for ending in endings]
    assert together == pytest.approx(alone, abs=CLOSE)


def test_labels_are_scored_in_a_context_with_room_for_one_only(llama: GgufEngine) -> None:
    endings = [[5 + number, 6, 7, 8, 9] for number in range(40)]
    llama.decode([5] * (CONTEXT - 5))
    scores = llama.score(endings)
    assert scores == pytest.approx([llama.score([ending])[0] for ending in endings], abs=CLOSE)
    with pytest.raises(UsageError, match=f"195 tokens and 6 .* {CONTEXT}"):
        llama.score([[5] * 6])


def test_scoring_leaves_the_sequence_as_it_was(engine: GgufEngine) -> None:
    tokens = engine.tokenizer.tokenize(TEXT)
    expected = fresh(engine, {"first": 1}, [*tokens, 9])
    fresh(engine, {"first": 1}, tokens)
    first = engine.score([[9, 8, 7], [9, 8], [3]])
    assert engine.score([[9, 8, 7], [9, 8], [3]]) == first
    assert engine.decode([9]) == pytest.approx(expected, abs=CLOSE)


def test_scoring_needs_logits(llama: GgufEngine) -> None:
    with pytest.raises(UsageError, match="decode"):
        llama.score([[1]])
    llama.decode([5, 6, 7])
    llama.truncate(2)
    with pytest.raises(UsageError, match="decode"):
        llama.score([[1]])


def test_a_sequence_trimmed_or_restored_goes_on_as_if_new(engine: GgufEngine) -> None:
    # Longer than the sliding window of the Gemma base, which a saved state does not cover.
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
        kept = engine.truncate(keep)
        assert kept in {0, keep}
        assert engine.decode([*tokens[kept:keep], *other]) == pytest.approx(expected[keep], abs=CLOSE)
        assert engine.truncate(0) == 0


def test_a_state_without_a_sliding_window_can_be_trimmed_anywhere(llama: GgufEngine) -> None:
    llama.decode([5] * 150)
    state = llama.save_state()
    llama.truncate(0)
    llama.restore_state(state)
    assert llama.truncate(20) == 20


def test_what_is_no_state_is_refused_and_the_engine_goes_on(llama: GgufEngine) -> None:
    llama.decode([5, 6])
    state = bytes(llama.save_state())
    expected = fresh(llama, {}, [5, 6, 7])
    # Cells that are not there, at positions outside the context, or of another sequence; more bytes, and fewer.
    changed = [state[:12] + struct.pack("<I", count) + state[16:] for count in (0, 1, 3, 2**31)]
    changed += [state[:16] + struct.pack("<i", position) + state[20:] for position in (-1, CONTEXT)]
    changed += [state[:20] + struct.pack("<ii", 2, 0) + state[28:], state[:20] + struct.pack("<ii", 1, 1) + state[28:]]
    for broken in (b"", b"\0" * 100, state[:-1], state + b"\0", *changed):
        with pytest.raises(VerificationError, match="state"):
            llama.restore_state(memoryview(broken))
        assert llama.truncate(5) == 0
    llama.restore_state(memoryview(state))
    assert llama.decode([7]) == pytest.approx(expected, abs=CLOSE)


def test_keys_and_values_in_8_bits_halve_a_state_and_change_little(wide_gguf: Callable[[int], Path]) -> None:
    base, tokens = wide_gguf(128), list(range(20, 60))
    with (
        closing(GgufEngine(base, context_length=CONTEXT, threads=1)) as whole,
        closing(GgufEngine(base, context_length=CONTEXT, threads=1, kv="q8_0")) as small,
    ):
        expected, found = log_p(whole.decode(tokens)), log_p(small.decode(tokens))
        assert 0 < (np.exp(expected) * (expected - found)).sum() < 1e-3
        assert len(small.save_state()) < 0.6 * len(whole.save_state())
        assert small.signatures[0] != whole.signatures[0]
        with pytest.raises(VerificationError, match="state"):
            small.restore_state(whole.save_state())


def test_repacked_weights_say_the_same_and_their_states_are_told_apart(tiny_gguf: Gguf, tmp_path: Path) -> None:
    from edgetune_export.backends.gguf.quantize import quantize_gguf  # noqa: PLC0415 - as above

    base, tokens = tmp_path / "q4_0.gguf", list(range(20, 60))
    quantize_gguf(tiny_gguf("llama"), base, "q4_0")
    with (
        closing(GgufEngine(base, context_length=CONTEXT, threads=1, repack=False)) as mapped,
        closing(GgufEngine(base, context_length=CONTEXT, threads=1, repack=True)) as repacked,
        closing(repacked.fork()) as fork,
    ):
        expected, found = log_p(mapped.decode(tokens)), log_p(repacked.decode(tokens))
        assert (np.exp(expected) * (expected - found)).sum() < 1e-3
        np.testing.assert_array_equal(log_p(fork.decode(tokens)), found)
        assert fork.signatures == repacked.signatures == mapped.signatures[::-1]


def test_weights_are_repacked_where_that_is_faster(tiny_gguf: Gguf, tmp_path: Path) -> None:
    from edgetune_export.backends.gguf.quantize import quantize_gguf  # noqa: PLC0415 - as above

    has_code = any(name in library().llama_print_system_info() for name in (b"AVX2 = 1", b"DOTPROD = 1"))
    for quantization, gains in (("q4_0", has_code), ("q8_0", False)):
        base = tmp_path / f"{quantization}.gguf"
        quantize_gguf(tiny_gguf("llama"), base, quantization)
        with closing(GgufEngine(base, context_length=CONTEXT, threads=1)) as engine:
            assert ("repacked" in engine.signatures[0]) == gains


def test_keys_and_values_of_another_form_or_of_odd_heads_are_refused(tiny_gguf: Gguf) -> None:
    with pytest.raises(UsageError, match="q4_0"):
        GgufEngine(tiny_gguf("llama"), context_length=CONTEXT, kv="q4_0")
    with pytest.raises(IncompatibleError, match="kv f16"):
        GgufEngine(tiny_gguf("llama"), context_length=CONTEXT, kv="q8_0")


def test_a_fork_has_a_sequence_of_its_own_and_the_same_adapters(engine: GgufEngine) -> None:
    tokens = [5, 6, 7, 8]
    expected = [fresh(engine, adapters, tokens) for adapters in ({"first": 1.0}, {})]
    other = engine.fork()
    other.activate({"first": 1.0})
    engine.activate({})
    engine.truncate(0)
    for token in tokens:
        found = (other.decode([token]), engine.decode([token]))
    assert found[0] == pytest.approx(expected[0], abs=CLOSE)
    assert found[1] == pytest.approx(expected[1], abs=CLOSE)
    other.close()


def test_tokens_that_do_not_fit_are_told_with_both_lengths(llama: GgufEngine) -> None:
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        llama.decode([5] * (CONTEXT + 1))
    llama.decode([5] * CONTEXT)
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens .* {CONTEXT}"):
        llama.decode_all([5])
    with pytest.raises(UsageError, match="no tokens"):
        llama.decode([])


@pytest.mark.parametrize("token", [-1, 384, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(llama: GgufEngine, token: int) -> None:
    with pytest.raises(UsageError, match="vocabulary"):
        llama.decode([5, token])
    with pytest.raises(UsageError, match="vocabulary"):
        llama.tokenizer.piece(token)
    with pytest.raises(UsageError, match="vocabulary"):
        llama.tokenizer.is_end(token)
    llama.decode([5])


def test_an_adapter_that_is_not_loaded_or_a_scale_that_is_no_number_is_refused(llama: GgufEngine) -> None:
    with pytest.raises(NotFoundError, match="third"):
        llama.activate({"third": 1})
    with pytest.raises(UsageError, match="nan"):
        llama.activate({"first": float("nan")})


@pytest.mark.parametrize("options", [{"context_length": 0}, {"threads": 0}, {"batch": 0}, {"threads": -3}])
def test_options_that_cannot_be_are_refused(options: dict[str, int], tiny_gguf: Gguf) -> None:
    with pytest.raises(UsageError, match="positive"):
        GgufEngine(tiny_gguf("llama"), **{"context_length": 32, **options})


def test_a_context_longer_than_the_base_was_trained_for_is_refused(tiny_gguf: Gguf) -> None:
    with pytest.raises(UsageError, match=r"context_length 513 is more .*; give at most 512"):
        GgufEngine(tiny_gguf("llama"), context_length=513)


def test_a_sound_gguf_file_that_is_no_model_is_told_with_what_it_lacks(tiny_gguf: Gguf, tmp_path: Path) -> None:
    base = tiny_gguf("llama")
    path = write_adapter(base, tmp_path / "a.gguf", low_rank(base, 1))
    with pytest.raises(VerificationError, match=r"a\.gguf is not a base .*: it has no list of tokens"):
        GgufEngine(path, context_length=32)


def test_closing_twice_is_no_error(llama: GgufEngine) -> None:
    llama.close()
    llama.close()


def test_nothing_is_written_to_the_terminal(tiny_gguf: Gguf, capfd: pytest.CaptureFixture[str]) -> None:
    engine = GgufEngine(tiny_gguf("llama"), context_length=32)
    engine.decode([5])
    engine.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_join_to_the_text_again(arch: str, tiny_gguf: Gguf) -> None:
    tokenizer = GgufTokenizer(tiny_gguf(arch))
    text = "turn on the lamp: 23 °C, ok?\n\n  fine 🙂"
    tokens = tokenizer.tokenize(text, continues=True)
    assert b"".join(map(tokenizer.piece, tokens)).decode() == text
    assert tokenizer.tokenize("", continues=True) == tokenizer.tokenize("") == []
    tokenizer.close()


def test_a_text_that_continues_gets_no_space_of_its_own(tiny_gguf: Gguf) -> None:
    tokenizer = GgufTokenizer(tiny_gguf("llama"))
    assert tokenizer.piece(tokenizer.tokenize("lamp")[0]).startswith(b" ")
    whole = tokenizer.tokenize("turn\nlamp")
    assert whole == [*tokenizer.tokenize("turn\n"), *tokenizer.tokenize("lamp", continues=True)]


def test_special_tokens_are_recognized_and_end_a_turn(tiny_gguf: Gguf) -> None:
    tokenizer = GgufTokenizer(tiny_gguf("llama"))
    assert tokenizer.tokenize("<|im_end|>")[-1] == tokenizer.end_token
    assert tokenizer.is_end(tokenizer.end_token)
    assert not tokenizer.is_end(tokenizer.tokenize("lamp")[0])
    assert tokenizer.piece(tokenizer.end_token) == b""
    assert tokenizer.chat_template is not None
    assert (tokenizer.bos, tokenizer.vocab_size) == ("<s>", 384)


def test_bos_is_added_once_where_the_vocabulary_wants_it(tiny_gguf: Gguf, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    data = tiny_gguf("llama").read_bytes()
    assert key + b"\0" in data
    path = tmp_path / "bos.gguf"
    path.write_bytes(data.replace(key + b"\0", key + b"\1"))
    tokenizer = GgufTokenizer(path)
    once = tokenizer.tokenize("lamp")
    assert tokenizer.piece(once[0]) == b""
    assert tokenizer.tokenize("<s>lamp").count(once[0]) == 1
    assert once[0] not in tokenizer.tokenize("lamp", continues=True)


def test_a_closed_tokenizer_says_so(tiny_gguf: Gguf) -> None:
    tokenizer = GgufTokenizer(tiny_gguf("llama"))
    tokenizer.close()
    tokenizer.close()
    with pytest.raises(UsageError, match="closed"):
        tokenizer.tokenize("lamp")
    with pytest.raises(UsageError, match="closed"):
        tokenizer.piece(5)


def test_text_that_is_no_text_is_tokenized_all_the_same(tiny_gguf: Gguf) -> None:
    tokenizer = GgufTokenizer(tiny_gguf("llama"))
    assert tokenizer.tokenize("a\ud800b") == tokenizer.tokenize("a?b")
    assert b"".join(map(tokenizer.piece, tokenizer.tokenize("a\0b"))) == b" a\0b"


WITHOUT_LLAMA = """
import sys
from pathlib import Path
sys.modules["llama_cpp"] = None
from edgetune_runtime import IncompatibleError
from edgetune_runtime.engines.gguf.engine import GgufTokenizer
try:
    GgufTokenizer(Path(sys.argv[1]))
except IncompatibleError as error:
    print(error)
"""


def test_without_llama_cpp_the_error_says_what_to_install(tiny_gguf: Gguf) -> None:
    command = [sys.executable, "-c", WITHOUT_LLAMA, str(tiny_gguf("llama"))]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'pip install "edgetune-runtime[gguf]"' in told
    assert "apt install g++" in told
    assert "xcode-select --install" in told
