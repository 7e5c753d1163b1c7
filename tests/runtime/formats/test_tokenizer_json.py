from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_export.backends.onnx.tokenizer import write_tokenizer
from edgetune_runtime import VerificationError
from edgetune_runtime.engines.onnx.encoder import EncoderTokenizer
from edgetune_runtime.engines.onnx.tokenizers import JsonTokenizer
from edgetune_runtime.formats.tokenizer_json import check_tokenizer
from tiny import make_encoder_folder

SLOW = "(a+)+$"
DOUBLE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


OTHERS: list[tuple[str, object]] = [
    ("normalizer", {"type": "Nmt"}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": SLOW}, "content": ""}),
    ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 64}),
    ("normalizer", {"type": "Lowercase", "more": 1}),
    ("normalizer", []),
    ("pre_tokenizer", split(SLOW)),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split(SLOW)]}),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": []}]}),
    ("pre_tokenizer", {"type": ["Split"]}),
    ("decoder", {"type": "CTC"}),
    ("post_processor", {"type": "Bogus"}),
    ("model", {"type": "WordLevel", "vocab": {}, "unk_token": ""}),
    ("model", None),
    ("more", 1),
]


@pytest.fixture
def folder(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tokenizer of a decoder, as the exporter writes it."""
    write_tokenizer(tiny_gguf("llama"), tmp_path)
    return tmp_path


def change(folder: Path, key: str, value: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_tokenizer_settings_that_no_exporter_writes_are_refused(folder: Path, key: str, value: object) -> None:
    change(folder, key, value)
    with pytest.raises(VerificationError, match="not a tokenizer that is known here") as raised:
        JsonTokenizer(folder, [])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"model": 1, "model": 2}', ""])
def test_a_tokenizer_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        check_tokenizer(text, tmp_path)


@pytest.mark.parametrize("table", [b"", struct.pack("<I", 1 << 31), struct.pack("<II", 4, 0xFFFFFFFF)])
def test_a_panic_of_the_library_is_one_line(table: bytes, tmp_path: Path) -> None:
    make_encoder_folder("bert", tmp_path)
    change(tmp_path, "normalizer", {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    with pytest.raises(VerificationError) as raised:
        EncoderTokenizer(tmp_path / "tokenizer.json").tokenize("turn on")
    assert "\n" not in str(raised.value)


def test_a_decoders_tokenizer_does_not_pad(folder: Path) -> None:
    padding = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "", "pad_to_multiple_of": None}
    tokens = JsonTokenizer(folder, []).tokenize("turn on")
    change(folder, "padding", {**padding, "strategy": {"Fixed": 10**12}})
    assert JsonTokenizer(folder, []).tokenize("turn on") == tokens
