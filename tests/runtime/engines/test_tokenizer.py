"""What both engines' tokenizers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from edgetune_export.backends.onnx.tokenizer import end_tokens, write_tokenizer
from edgetune_runtime.engines.base import Tokenizer
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer
from edgetune_runtime.errors import UsageError

Open = Callable[[str], Tokenizer]


@pytest.fixture
def open_(engine: str, tiny_gguf: Callable[[str], Path], tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as opened:

        def call(arch: str) -> Tokenizer:
            base = tiny_gguf(arch)
            if engine == "gguf":
                return opened.enter_context(closing(GgufTokenizer(base)))
            write_tokenizer(base, tmp_path)
            return opened.enter_context(closing(JsonTokenizer(tmp_path, end_tokens(base))))

        yield call


@pytest.fixture
def tokenizer(open_: Open) -> Tokenizer:
    return open_("llama")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tokens_join_to_the_text_again(arch: str, open_: Open) -> None:
    tokenizer = open_(arch)
    text = "turn on the lamp: 23 °C, ok?\n\n  fine 🙂\0"
    tokens = tokenizer.tokenize(text, continues=True)
    assert b"".join(map(tokenizer.piece, tokens)).decode() == text
    assert tokenizer.tokenize("", continues=True) == tokenizer.tokenize("") == []


def test_a_text_that_continues_gets_no_space_of_its_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.piece(tokenizer.tokenize("lamp")[0]).startswith(b" ")
    whole = tokenizer.tokenize("turn\nlamp")
    assert whole == [*tokenizer.tokenize("turn\n"), *tokenizer.tokenize("lamp", continues=True)]


def test_special_tokens_are_recognized_and_end_a_turn(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokenize("lamp<|im_end|>")[-1] == tokenizer.end_token
    assert tokenizer.is_end(tokenizer.end_token)
    assert not tokenizer.is_end(tokenizer.tokenize("lamp")[0])
    assert tokenizer.piece(tokenizer.end_token) == b""
    assert tokenizer.chat_template is not None
    assert (tokenizer.bos, tokenizer.vocab_size) == ("<s>", 384)


@pytest.mark.parametrize("token", [-1, 384, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(token: int, tokenizer: Tokenizer) -> None:
    for use in (tokenizer.piece, tokenizer.is_end):
        with pytest.raises(UsageError, match=f"no token {token} in a vocabulary of 384"):
            use(token)


def test_a_closed_tokenizer_says_so(tokenizer: Tokenizer) -> None:
    tokenizer.close()
    tokenizer.close()
    for call in (lambda: tokenizer.tokenize("lamp"), lambda: tokenizer.piece(5), lambda: tokenizer.is_end(4)):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_text_that_is_no_text_is_tokenized_all_the_same(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokenize("a\ud800b") == tokenizer.tokenize("a?b")
    assert b"".join(map(tokenizer.piece, tokenizer.tokenize("a\0b"))) == b" a\0b"
