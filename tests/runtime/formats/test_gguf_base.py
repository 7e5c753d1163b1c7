from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgetune_export import architectures
from edgetune_runtime import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_base import ARCHITECTURES, check_base
from edgetune_runtime.formats.gguf_file import read_header
from runtime.gguf_files import ARRAY, BOOL, FLOAT32, STRING, UINT32, Fields, rewritten, setting, with_first_tokens

from edgetune.bases import locate

Change = Callable[[Fields], object]
TOKENS = "tokenizer.ggml.tokens"
OPEN = """
import sys
from pathlib import Path
from edgetune_runtime.engines.gguf.engine import GgufEngine
from edgetune_runtime.errors import EdgetuneError
for name in sys.argv[1:]:
    try:
        engine = GgufEngine(Path(name), context_length=32, threads=1)
        engine.decode(engine.tokenizer.tokenize("turn on \\u00e9"))
    except EdgetuneError as error:
        print(type(error).__name__, str(error).count("\\n"))
"""


def items(key: str, change: Callable[[list], list]) -> Change:
    """A change of an array."""

    def apply(fields: Fields) -> None:
        values, kind, kind_of_items = fields[key]
        fields[key] = (change(values), kind, kind_of_items)

    return apply


def without(key: str) -> Change:
    return lambda fields: fields.pop(key)


def number(key: str, value: int) -> Change:
    return setting(f"llama.{key}", value, UINT32)


ABORTS = {
    "a token twice": items(TOKENS, lambda tokens: [*tokens[:-1], tokens[-2]]),
    "an empty token and its name in llama.cpp": items(TOKENS, lambda tokens: ["", *tokens[1:-1], "[EMPTY_0]"]),
    "tokens that differ after a NUL": items(TOKENS, lambda tokens: [*tokens[:-1], f"{tokens[-2]}\0"]),
    "no layers": number("block_count", 0),
    "a million layers": number("block_count", 10**6),
    "an epsilon that is no number": setting("llama.attention.layer_norm_rms_epsilon", math.nan, FLOAT32),
    "a negative epsilon": setting("llama.attention.layer_norm_rms_epsilon", -1e-6, FLOAT32),
    "too many experts": number("expert_count", 200_000),
    "experts in use": number("expert_used_count", 8),
    "draft layers": number("nextn_predict_layers", 5),
    "an unknown scaling": setting("llama.rope.scaling.type", "bogus", STRING),
    "an odd rotation": number("rope.dimension_count", 15),
    "a key that ends at a NUL": number("expert_count\0", 9999),
}
DIFFERS = {
    "a missing hyperparameter": without("llama.embedding_length"),
    "a hyperparameter of another architecture": number("embedding_length_out", 32),
    "pooling": number("pooling_type", 1),
    "attention to later tokens": setting("llama.attention.causal", False, BOOL),
    "a context of nothing": number("context_length", 0),
    "other layers": number("block_count", 3),
    "another width": number("embedding_length", 32),
    "other heads": number("attention.head_count", 2),
    "heads that do not divide": number("attention.head_count_kv", 3),
    "other sizes of keys and values": number("attention.value_length", 8),
    "another vocabulary": number("vocab_size", 7),
    "a hyperparameter in a list": setting("llama.block_count", [2, 2], ARRAY),
    "a tokenizer without a byte": items(TOKENS, lambda tokens: [f"{t}_" if t == "<0x41>" else t for t in tokens]),
    "an encoder's tokenizer": setting("tokenizer.ggml.model", "bert", STRING),
    "no tokens": without(TOKENS),
    "scores of other tokens": items("tokenizer.ggml.scores", lambda scores: scores[1:]),
    "a score that is no number": items("tokenizer.ggml.scores", lambda scores: [math.nan, *scores[1:]]),
    "an unknown token type": items("tokenizer.ggml.token_type", lambda types: [9, *types[1:]]),
    "an end token outside the vocabulary": setting("tokenizer.ggml.eos_token_id", 100_000, UINT32),
    "an unknown key of the tokenizer": setting("tokenizer.ggml.bogus", 1, UINT32),
}


@pytest.fixture(scope="module")
def llama(tiny_gguf: Callable[[str], Path]) -> Path:
    return tiny_gguf("llama")


@pytest.mark.parametrize("arch", sorted(architectures.known()))
def test_converted_bases_pass(arch: str, converted_gguf: Callable[[str], Path]) -> None:
    check_base(read_header(converted_gguf(arch)), converted_gguf(arch))


def test_a_base_of_another_converter_passes(tmp_path: Path) -> None:
    path = locate("smollm2-135m", tmp_path)
    check_base(read_header(path), path)


def test_the_runtime_lists_the_architectures_of_the_export() -> None:
    assert set(ARCHITECTURES) == {architecture.gguf for architecture in architectures.known().values()}


@pytest.mark.parametrize("name", ABORTS | DIFFERS)
def test_a_base_that_no_converter_writes_is_refused(name: str, llama: Path, tmp_path: Path) -> None:
    path = rewritten(llama, tmp_path / "base.gguf", (ABORTS | DIFFERS)[name])
    with pytest.raises(VerificationError) as raised:
        check_base(read_header(path), path)
    assert "\n" not in str(raised.value)


SHARED, FLAGS = "gemma4.attention.shared_kv_layers", "gemma4.attention.sliding_window_pattern"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (setting(SHARED, 3, UINT32), "the last two of 6 layers before .* 3 are not of both kinds"),
        (setting(SHARED, 5, UINT32), "the last two of 6 layers before .* 5 are not"),
        (setting(SHARED, 7, UINT32), "the last two of 6 layers before .* 7 are not"),
        (items(FLAGS, lambda flags: [*flags[:3], True, *flags[4:]]), "the last two of 6 layers before"),
        (items(FLAGS, lambda flags: flags[:5]), "has 5 entries for 6 layers"),
        (items("gemma4.feed_forward_length", lambda widths: widths[:5]), "has 5 entries for 6 layers"),
        (setting("gemma4.rope.dimension_count_swa", 8, UINT32), "is 8, not the size 16 of heads"),
        (without("gemma4.rope.dimension_count_swa"), "is 32, not the size 16 of heads"),
        (setting("gemma4.embedding_length_per_layer_input", 0, UINT32), "without inputs .*; use a Gemma 4 E2B or E4B"),
    ],
)
def test_layers_of_a_gemma4_that_cannot_share_keys_are_refused(
    change: Change, told: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewritten(tiny_gguf("gemma4"), tmp_path / "base.gguf", change)
    with pytest.raises((IncompatibleError, VerificationError), match=told):
        check_base(read_header(path), path)


HEADS, SECTIONS = "lfm2.attention.head_count_kv", "qwen35.rope.dimension_sections"


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (HEADS, lambda heads: heads[1:]),
        (HEADS, lambda heads: [0] * len(heads)),
        (HEADS, lambda heads: [1, 2, *heads[2:]]),
        (SECTIONS, lambda sections: sections[:3]),
        (SECTIONS, lambda _: [0] * 4),
        (SECTIONS, lambda _: [512] * 4),
    ],
)
def test_heads_that_differ_and_sections_that_do_not_fit_are_refused(
    key: str, change: Callable[[list], list], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewritten(tiny_gguf(key.partition(".")[0]), tmp_path / "base.gguf", items(key, change))
    with pytest.raises(VerificationError, match=key):
        check_base(read_header(path), path)


@pytest.fixture(scope="module")
def byte_level(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the first 400 tokens of a byte-level vocabulary: all bytes, and some of their merges."""
    path = with_first_tokens(tiny_gguf("olmo2"), tmp_path_factory.mktemp("byte-level") / "base.gguf", 400)
    check_base(read_header(path), path)
    return path


def test_a_byte_level_vocabulary_with_the_wrong_model_or_merges_is_refused(byte_level: Path, tmp_path: Path) -> None:
    changes: list[tuple[Change, str]] = [
        (setting("tokenizer.ggml.model", "llama", STRING), "no token for byte 0x00"),
        (setting("tokenizer.ggml.pre", "whitespace", STRING), "pre-tokenizer"),
        (items("tokenizer.ggml.merges", lambda merges: [*merges, "one"]), "'one', which is not two texts"),
        (setting("tokenizer.ggml.merges", 1, UINT32), "not a list of texts"),
    ]
    for change, told in changes:
        path = rewritten(byte_level, tmp_path / "base.gguf", change)
        with pytest.raises(VerificationError, match=told):
            check_base(read_header(path), path)


def test_tensors_of_other_types_or_blocks_are_refused(llama: Path, tmp_path: Path) -> None:
    vector, matrix = np.ones(64, np.float16), np.ones((64, 64), np.int8)
    for tensors in ({"blk.0.attn_norm.weight": vector}, {"blk.0.attn_q.weight": matrix}, {"blk.7.extra": vector}):
        path = rewritten(llama, tmp_path / "base.gguf", tensors=tensors)
        with pytest.raises(VerificationError):
            check_base(read_header(path), path)


def test_layers_for_drafts_that_the_converter_writes_by_default_name_its_option(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewritten(tiny_gguf("qwen35"), tmp_path / "base.gguf", setting("qwen35.nextn_predict_layers", 1, UINT32))
    with pytest.raises(IncompatibleError, match=r"drafts \(MTP\), .*; use a file converted with --no-mtp"):
        check_base(read_header(path), path)


def test_an_unsupported_architecture_is_incompatible(llama: Path, tmp_path: Path) -> None:
    path = rewritten(llama, tmp_path / "base.gguf", setting("general.architecture", "mamba", STRING))
    with pytest.raises(IncompatibleError, match=r"architecture 'mamba'.*llama, qwen2"):
        check_base(read_header(path), path)


def test_hostile_bases_do_not_abort_the_process_that_opens_them(llama: Path, tmp_path: Path) -> None:
    paths = [rewritten(llama, tmp_path / f"{n}.gguf", change) for n, change in enumerate(ABORTS.values())]
    child = subprocess.run([sys.executable, "-c", OPEN, *map(str, paths)], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout.split("\n")[:-1]) == (0, ["VerificationError 0"] * len(paths))


def test_a_part_of_a_split_file_is_refused_and_a_merged_one_is_not(llama: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        path = rewritten(llama, tmp_path / "base-00001-of-00002.gguf", setting("split.count", count, UINT32))
        with pytest.raises(IncompatibleError, match="llama-gguf-split"):
            read_header(path)
    read_header(rewritten(llama, tmp_path / "base.gguf", setting("split.count", 0, UINT32)))
