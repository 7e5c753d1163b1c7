from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from edgetune_runtime import NotFoundError, VerificationError
from edgetune_runtime.formats.gguf_file import (
    PER_LAYER_EMBEDDING,
    GgufHeader,
    TensorInfo,
    digest_of_chat_template,
    digest_of_tokenizer,
    read_header,
)
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from runtime.gguf_files import changed

Gguf = Callable[[str], Path]
STRING, UINT32 = 8, 4


@pytest.fixture
def base(tiny_gguf: Gguf) -> Path:
    return tiny_gguf("llama")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header_bytes(tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def tensor_bytes(name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_header_matches_that_of_the_gguf_package(tiny_gguf: Gguf, arch: str) -> None:
    header, expected = read_header(tiny_gguf(arch)), gguf.GGUFReader(tiny_gguf(arch))
    assert header.architecture == arch
    assert header.metadata["tokenizer.ggml.tokens"] == tuple(expected.fields["tokenizer.ggml.tokens"].contents())
    assert header.metadata[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert {t.name: (t.shape, t.ggml_type, t.offset, t.nbytes) for t in header.tensors.values()} == {
        t.name: (tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in expected.tensors
    }


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_header(tmp_path / "none.gguf")


def test_a_folder_and_a_pipe_are_no_gguf_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(VerificationError, match="not a regular file"):
            read_header(path)


def test_a_file_cut_off_anywhere_is_damaged(base: Path, tmp_path: Path) -> None:
    data = base.read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = [0, 3, 4, 23, 24, 40, 2000, len(data) // 2, len(data) - 1]
    for length in lengths:
        cut.write_bytes(data[:length])
        with pytest.raises(VerificationError):
            read_header(cut)


@pytest.mark.parametrize(
    "data",
    [
        b"GGML" + header_bytes()[4:],
        header_bytes(version=1),
        header_bytes(version=0x03000000),
        header_bytes(tensors=2**62),
        header_bytes(keys=2**63),
        header_bytes(keys=1, body=struct.pack("<Q", 2**40)),
        header_bytes(keys=1, body=string(b"k") + struct.pack("<I", 99)),
        header_bytes(keys=1, body=string(b"") + struct.pack("<IB", 0, 1)),
        header_bytes(keys=2, body=2 * (string(b"k") + struct.pack("<IB", 0, 1))),
        header_bytes(keys=1, body=string(b"k") + struct.pack("<IIQ", 9, STRING, 2**61)),
        header_bytes(keys=1, body=string(b"k") + struct.pack("<IIQ", 9, UINT32, 2**62)),
        header_bytes(keys=1, body=string(b"k") + struct.pack("<IIQ", 9, 9, 1)),
        header_bytes(keys=1, body=string(b"general.alignment") + struct.pack("<II", UINT32, 0)),
        header_bytes(keys=1, body=string(b"general.alignment") + struct.pack("<II", UINT32, 3)),
        header_bytes(keys=1, body=string(b"general.alignment") + struct.pack("<IQ", 10, 32)),
        header_bytes(1, 0, tensor_bytes(b"")),
        header_bytes(1, 0, tensor_bytes(b"n" * 64)),
        header_bytes(1, 0, tensor_bytes(b"a\0b")),
        header_bytes(1, 0, tensor_bytes(shape=())),
        header_bytes(1, 0, tensor_bytes(shape=(1, 1, 1, 1, 1))),
        header_bytes(1, 0, tensor_bytes(shape=(4, 0))),
        header_bytes(1, 0, tensor_bytes(shape=(2**62, 2**62))),
        header_bytes(1, 0, tensor_bytes(kind=4)),
        header_bytes(1, 0, tensor_bytes(shape=(33,), kind=8)),
        header_bytes(1, 0, tensor_bytes(offset=32)),
        header_bytes(1, 0, tensor_bytes(offset=2**63)),
        header_bytes(2, 0, tensor_bytes(b"a") + tensor_bytes(b"a", offset=32)),
        header_bytes(2, 0, tensor_bytes(b"a") + tensor_bytes(b"b", offset=0)),
    ],
)
def test_a_header_that_cannot_be_is_damaged(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    # Room behind it, so that only what is wrong with the header can be the reason.
    path.write_bytes(data + bytes(4096))
    with pytest.raises(VerificationError, match="bad"):
        read_header(path)


def test_the_same_file_without_fault_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    alignment = string(b"general.alignment") + struct.pack("<II", UINT32, 64)
    tensors = tensor_bytes(b"a") + tensor_bytes(b"b", offset=64)
    path.write_bytes(header_bytes(2, 1, alignment + tensors) + bytes(4096))
    read = read_header(path).tensors.values()
    assert [(t.name, t.offset % 64, t.nbytes, t.type.name) for t in read] == [
        ("a", 0, 16, "f32"),
        ("b", 0, 16, "f32"),
    ]


def test_the_tokenizers_digest_depends_on_the_tokens_and_not_on_weights_or_template(tiny_gguf: Gguf) -> None:
    first, second = read_header(tiny_gguf("llama")), read_header(tiny_gguf("qwen3"))
    assert digest_of_tokenizer(first) == digest_of_tokenizer(second)
    template = changed(first, "tokenizer.chat_template", "other")
    assert digest_of_tokenizer(template) == digest_of_tokenizer(first)
    assert digest_of_chat_template(template) != digest_of_chat_template(first)
    tokens = changed(first, "tokenizer.ggml.tokens", first.metadata["tokenizer.ggml.tokens"][::-1])
    assert digest_of_tokenizer(tokens) != digest_of_tokenizer(first)


def test_flipped_bytes_in_a_bases_header_are_refused_or_read(base: Path, tmp_path: Path) -> None:
    data, rng = base.read_bytes(), random.Random(0)
    start = min(tensor.offset for tensor in read_header(base).tensors.values())
    path = tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(300):
        flipped = bytearray(data)
        flipped[rng.randrange(start)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            read_header(path)
        except VerificationError:
            refused += 1
    assert 0 < refused < 300


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_output_share_is_that_of_the_matrix_that_gives_logits(tiny_gguf: Gguf, arch: str) -> None:
    tensors = {tensor.name: tensor.n_elements for tensor in gguf.GGUFReader(tiny_gguf(arch)).tensors}
    embedding = tensors["token_embd.weight"]
    read = sum(tensors.values()) - (embedding if "output.weight" in tensors else 0)
    assert read_header(tiny_gguf(arch)).output_share == pytest.approx(embedding / read)
    assert 0 < embedding / read < 1


def test_embeddings_do_not_decide_the_main_type_nor_those_of_each_layer_the_output_share() -> None:
    def matrix(name: str, kind: str, rows: int) -> TensorInfo:
        return TensorInfo(name, (256, rows), TENSOR_TYPES[kind].number, 0, 0)

    whole = [
        matrix("token_embd.weight", "q6_k", 100),
        matrix("blk.0.ffn_up.weight", "q4_0", 300),
        matrix(PER_LAYER_EMBEDDING, "q6_k", 9000),
    ]
    header = GgufHeader({}, {tensor.name: tensor for tensor in whole})
    assert (header.main_type.name, header.output_share) == ("q4_0", 0.25)
    assert header.layer_types == ("q4_0",)
    larger = [matrix("token_embd.weight", "f16", 900), *whole[1:]]
    assert GgufHeader({}, {tensor.name: tensor for tensor in larger}).main_type.name == "q4_0"
    assert header.values_by_type == {"q6_k": 256 * 9100, "q4_0": 256 * 300}
