from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from edgetune_export.backends.onnx.tokenizer import write_tokenizer
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer
from edgetune_runtime.errors import NotFoundError, VerificationError

Gguf = Callable[[str], Path]


@pytest.fixture
def folder(tiny_gguf: Gguf, tmp_path: Path) -> Path:
    write_tokenizer(tiny_gguf("llama"), tmp_path)
    return tmp_path


def test_the_first_end_token_ends_a_turn_and_others_end_an_answer(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder, [4, 2])
    assert tokenizer.end_token == 4 and tokenizer.is_end(4) and tokenizer.is_end(2)
    for token in (-1, 384):
        with pytest.raises(VerificationError, match=f"end token {token}"):
            JsonTokenizer(folder, [token])


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
