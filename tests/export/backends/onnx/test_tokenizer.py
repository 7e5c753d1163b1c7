from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path

import gguf
import pytest
from edgetune_export.backends.onnx.tokenizer import end_tokens, write_tokenizer
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_file import read_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Gguf = Callable[[str], Path]
Pair = tuple[GgufTokenizer, JsonTokenizer]

BASES = ("llama", "gemma3", "gemma4", "smollm2")
# Those of SmolLM2 that a test of each pre-tokenizer has; all of them take 2 s to read.
PRE_TOKENS = 6000
MARKERS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im", "<0x0A>", "|>", "[UNK]"]
WORDS = [
    "a", "lamp", " Lamp", "turn's", "'LL", "'", " don't", "1", "23", "4567", "!?", "...", "é", "ß", "漢字", "हिन्दी",
]  # fmt: skip
SIGNS = ["١٢", "½", "Ⅷ", "🙂", "👩\u200d👧", "▁", "\u200b", "\u0301", "\x04", "\x1f", "\0", "\ud83d"]
SPACES = [" ", "  ", "     ", "\n", "\n\n\n", "\r\n", "\t", "\v", "\u0085", "\u00a0", "\u3000"]

# Unassigned code points are left out, as those of Unicode 16 are letters to one library and nothing to the other.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=8)
TEXTS = st.lists(st.sampled_from([*MARKERS, *WORDS, *SIGNS, *SPACES]) | ANY_TEXT, max_size=14).map("".join)
quick = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def differences(base: Path, folder: Path, texts: Sequence[str]) -> list[str]:
    """The texts for which the tokenizer in `folder` gives different tokens than the base's own."""
    with closing(GgufTokenizer(base)) as ours, closing(JsonTokenizer(folder, end_tokens(base))) as written:
        return [text for text in texts if ours.tokenize(text) != written.tokenize(text)]


@pytest.fixture(scope="module")
def base(tiny_gguf: Gguf, request: pytest.FixtureRequest) -> Gguf:
    return lambda name: request.getfixturevalue("smollm2") if name == "smollm2" else tiny_gguf(name)


@pytest.fixture(scope="module")
def pair_of_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Pair]]:
    """`pair_of_file(path)`: the tokenizer of a GGUF file and the one that is written from it."""
    with ExitStack() as stack:

        @cache
        def make(path: Path) -> Pair:
            folder = tmp_path_factory.mktemp("written")
            write_tokenizer(path, folder)
            return stack.enter_context(closing(GgufTokenizer(path))), JsonTokenizer(folder, end_tokens(path))

        yield make


@pytest.fixture(scope="module")
def pair(base: Gguf, pair_of_file: Callable[[Path], Pair]) -> Callable[[str], Pair]:
    """`pair(name)`: both tokenizers of a base."""
    return lambda name: pair_of_file(base(name))


def write_vocabulary(
    path: Path,
    tokens: Sequence[str],
    merges: Sequence[str] = (),
    *,
    kinds: Sequence[int] | None = None,
    model: str = "gpt2",
    pre: str | None = None,
) -> Path:
    """A GGUF file that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds or [1] * len(tokens)))
    writer.add_token_merges(list(merges))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", BASES)
@given(text=TEXTS, continues=st.booleans())
@quick
def test_texts_get_the_tokens_of_llama_cpp(name: str, text: str, continues: bool, pair: Callable[[str], Pair]) -> None:
    ours, written = pair(name)
    tokens = written.tokenize(text, continues=continues)
    assert tokens == ours.tokenize(text, continues=continues)
    assert [written.piece(token) for token in tokens] == [ours.piece(token) for token in tokens]


@pytest.mark.parametrize("name", BASES)
def test_every_token_has_the_piece_and_the_end_of_llama_cpp(name: str, pair: Callable[[str], Pair]) -> None:
    ours, written = pair(name)
    assert written.vocab_size == ours.vocab_size
    for token in range(ours.vocab_size):
        assert (written.piece(token), written.is_end(token)) == (ours.piece(token), ours.is_end(token)), token


@pytest.mark.parametrize("name", BASES)
def test_what_belongs_to_the_vocabulary_is_kept(name: str, pair: Callable[[str], Pair]) -> None:
    ours, written = pair(name)
    assert (written.bos, written.eos, written.end_token) == (ours.bos, ours.eos, ours.end_token)
    assert written.chat_template == ours.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
@given(texts=st.lists(TEXTS, max_size=5))
@settings(quick, max_examples=40)
def test_each_pre_tokenizer_splits_as_llama_cpp_does(
    pre: str, texts: list[str], pair_of_pre: Callable[[str | None], Pair]
) -> None:
    ours, written = pair_of_pre(pre)
    assert [written.tokenize(text) for text in texts] == [ours.tokenize(text) for text in texts]


@pytest.mark.slow
def test_a_vocabulary_without_a_pre_tokenizer_is_split_as_llama_cpp_does(
    pair_of_pre: Callable[[str | None], Pair],
) -> None:
    ours, written = pair_of_pre(None)
    text = "".join([*WORDS, *SIGNS, *SPACES])
    assert written.tokenize(text) == ours.tokenize(text)


@pytest.fixture(scope="module")
def pair_of_pre(
    smollm2: Path, pair_of_file: Callable[[Path], Pair], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str | None], Pair]:
    """`pair_of_pre(pre)`: the first tokens of SmolLM2's vocabulary under another pre-tokenizer, twice as in `pair`."""

    @cache
    def make(pre: str | None) -> Pair:
        metadata = read_header(smollm2).metadata
        tokens, merges, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type"))
        path = tmp_path_factory.mktemp("pre") / "base.gguf"
        # Each merge makes the next token, at the end of the vocabulary.
        kept = merges[: PRE_TOKENS - len(tokens) + len(merges)]
        return pair_of_file(write_vocabulary(path, tokens[:PRE_TOKENS], kept, kinds=kinds[:PRE_TOKENS], pre=pre))

    return make


def test_tokens_that_llama_cpp_prints_as_nothing_or_as_they_are_stay_so(tmp_path: Path) -> None:
    tokens = ["a", "\u0120a", "[PAD]", "<tool call>", "<|im_end|>", "\u4e2d", "b"]
    path = write_vocabulary(tmp_path / "base.gguf", tokens, ["\u0120 a"], kinds=[1, 1, 5, 4, 1, 1, 1], pre="gpt-2")
    write_tokenizer(path, tmp_path)
    ours, written = GgufTokenizer(path), JsonTokenizer(tmp_path, end_tokens(path))
    pieces = [written.piece(token) for token in range(len(tokens))]
    assert pieces == [ours.piece(token) for token in range(len(tokens))]
    assert pieces[:5] == [b"a", b" a", b"", b"<tool call>", b""]
    text = "a<tool call>[PAD]<|im_end|>b"
    assert written.tokenize(text) == ours.tokenize(text)
    assert written.is_end(4)
    ours.close()


def test_bos_is_written_where_the_vocabulary_wants_it(tiny_gguf: Gguf, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")
    path = tmp_path / "bos.gguf"
    path.write_bytes(tiny_gguf("llama").read_bytes().replace(key + b"\0", key + b"\1"))
    write_tokenizer(path, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert differences(path, tmp_path, ["lamp", "<s>lamp", ""]) == []
    assert JsonTokenizer(tmp_path, []).tokenize("") == [1]


def test_the_token_that_ends_a_turn_comes_first(tiny_gguf: Gguf) -> None:
    tokens = end_tokens(tiny_gguf("llama"))
    tokenizer = GgufTokenizer(tiny_gguf("llama"))
    assert tokens[0] == tokenizer.end_token
    assert sorted(tokens) == [token for token in range(tokenizer.vocab_size) if tokenizer.is_end(token)]
    tokenizer.close()


def test_differences_names_the_texts_that_differ(tiny_gguf: Gguf, tmp_path: Path) -> None:
    # Gemma puts no space in front of the first word.
    write_tokenizer(tiny_gguf("llama"), tmp_path)
    assert differences(tiny_gguf("llama"), tmp_path, ["lamp", "<s>"]) == []
    assert differences(tiny_gguf("gemma3"), tmp_path, ["lamp", "<s>"]) == ["lamp"]


def test_the_chat_template_is_a_file_of_its_own(tiny_gguf: Gguf, tmp_path: Path) -> None:
    write_tokenizer(tiny_gguf("llama"), tmp_path)
    template = JsonTokenizer(tmp_path, []).chat_template
    assert (tmp_path / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize(("model", "pre", "named"), [("gpt2", "falcon", "'falcon'"), ("t5", None, "'t5'")])
def test_an_unknown_kind_is_refused_by_name(model: str, pre: str | None, named: str, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "base.gguf", ["a", "b"], model=model, pre=pre)
    with pytest.raises(IncompatibleError, match=f"{named}; build for gguf"):
        write_tokenizer(path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_vocabulary_without_bytes_is_refused(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "a"]
    path = write_vocabulary(tmp_path / "base.gguf", tokens, kinds=[2, 3, 3, 6, 1], model="llama")
    with pytest.raises(VerificationError, match="no token for byte 0x00"):
        write_tokenizer(path, tmp_path)
