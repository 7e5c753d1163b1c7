from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_export.backends.onnx.tokenizer import end_tokens, write_tokenizer
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer
from edgetune_runtime.errors import NotFoundError, UsageError, VerificationError

Gguf = Callable[[str], Path]


@pytest.fixture
def folder(tiny_gguf: Gguf, tmp_path: Path) -> Path:
    write_tokenizer(tiny_gguf("llama"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_tokens_join_to_the_text_again(arch: str, tiny_gguf: Gguf, tmp_path: Path) -> None:
    write_tokenizer(tiny_gguf(arch), tmp_path)
    tokenizer = JsonTokenizer(tmp_path, end_tokens(tiny_gguf(arch)))
    text = "turn on the lamp: 23 °C, ok?\n\n  fine 🙂\0"
    tokens = tokenizer.tokenize(text, continues=True)
    assert b"".join(map(tokenizer.piece, tokens)).decode() == text
    assert tokenizer.tokenize("", continues=True) == tokenizer.tokenize("") == []


def test_a_text_that_continues_gets_no_space_of_its_own(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder, [])
    assert tokenizer.piece(tokenizer.tokenize("lamp")[0]).startswith(b" ")
    whole = tokenizer.tokenize("turn\nlamp")
    assert whole == [*tokenizer.tokenize("turn\n"), *tokenizer.tokenize("lamp", continues=True)]


def test_special_tokens_are_recognized_and_the_first_end_token_ends_a_turn(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder, [4, 2])
    assert tokenizer.tokenize("lamp<|im_end|>")[-1] == tokenizer.end_token == 4
    assert tokenizer.is_end(4)
    assert tokenizer.is_end(2)
    assert not tokenizer.is_end(tokenizer.tokenize("lamp")[0])
    assert tokenizer.piece(4) == b""
    assert (tokenizer.bos, tokenizer.vocab_size) == ("<s>", 384)


def test_text_that_is_no_text_is_tokenized_all_the_same(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder, [])
    assert tokenizer.tokenize("a\ud800b") == tokenizer.tokenize("a?b")


@pytest.mark.parametrize("token", [-1, 384])
def test_a_token_outside_the_vocabulary_is_refused(token: int, folder: Path) -> None:
    tokenizer = JsonTokenizer(folder, [])
    with pytest.raises(UsageError, match=f"no token {token} in a vocabulary of 384"):
        tokenizer.piece(token)
    with pytest.raises(UsageError, match=f"no token {token}"):
        tokenizer.is_end(token)
    with pytest.raises(VerificationError, match=f"end token {token}"):
        JsonTokenizer(folder, [token])


def test_a_closed_tokenizer_says_so(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder, [4])
    tokenizer.close()
    tokenizer.close()
    for call in (lambda: tokenizer.tokenize("lamp"), lambda: tokenizer.piece(5), lambda: tokenizer.is_end(4)):
        with pytest.raises(UsageError, match="closed"):
            call()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(NotFoundError, match=name):
        JsonTokenizer(folder, [])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_that_says_something_else_is_refused(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(VerificationError, match=name):
        JsonTokenizer(folder, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [("bos_token", 1), ("eos_token", []), ("add_bos_token", "yes"), ("unused_tokens", [[]]), ("chat_template", 5)],
)
def test_a_setting_of_another_type_is_named(key: str, value: object, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(VerificationError, match=f"no valid {key}"):
        JsonTokenizer(folder, [])


def test_flipped_bits_end_in_an_error_or_a_tokenizer(folder: Path) -> None:
    rng = random.Random(0)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        whole = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                tokenizer = JsonTokenizer(folder, [])
                for token in tokenizer.tokenize("turn on <s> 23 °C\n"):
                    tokenizer.piece(token)
            except VerificationError:
                pass
        path.write_bytes(whole)


WITHOUT_TOKENIZERS = """
import sys
from pathlib import Path
sys.modules["tokenizers"] = None
from edgetune_runtime import IncompatibleError
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer
try:
    JsonTokenizer(Path("."), [])
except IncompatibleError as error:
    print(error)
"""


def test_without_tokenizers_the_error_says_what_to_install() -> None:
    told = subprocess.run([sys.executable, "-c", WITHOUT_TOKENIZERS], capture_output=True, text=True, check=True).stdout
    assert 'pip install "edgetune-runtime[onnx]"' in told
