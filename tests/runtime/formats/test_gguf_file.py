from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from edgetune_runtime import IncompatibleError, NotFoundError, VerificationError
from edgetune_runtime.formats.gguf_file import (
    INVOCATION_TOKENS,
    PER_LAYER_EMBEDDING,
    GgufHeader,
    TensorInfo,
    check_adapter,
    digest_of_chat_template,
    digest_of_tokenizer,
    read_header,
)
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from runtime.bundles import low_rank, write_adapter

Gguf = Callable[[str], Path]
STRING, UINT32 = 8, 4


@pytest.fixture
def base(tiny_gguf: Gguf) -> Path:
    return tiny_gguf("llama")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(base, tmp_path / "adapter.gguf", low_rank(base, seed=1))


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


def test_a_folder_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="folder"):
        read_header(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.gguf")
    with pytest.raises(VerificationError, match="not a regular file"):
        read_header(tmp_path / "base.gguf")


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


def changed(header: GgufHeader, key: str, value: object) -> GgufHeader:
    return replace(header, metadata={**header.metadata, key: value})


def test_a_sound_adapter_passes(adapter: Path, base: Path) -> None:
    check_adapter(read_header(adapter), read_header(base), "command")


def test_an_adapter_of_another_architecture_is_incompatible(adapter: Path, tiny_gguf: Gguf) -> None:
    with pytest.raises(IncompatibleError, match=r"llama.*qwen3"):
        check_adapter(read_header(adapter), read_header(tiny_gguf("qwen3")), "command")


def write_raw(
    path: Path, tensors: dict[str, np.ndarray], alpha: object = 4.0, kinds: dict[str, int] | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    if isinstance(alpha, np.float64):
        writer.add_float64("adapter.lora.alpha", float(alpha))
    elif isinstance(alpha, float):
        writer.add_float32("adapter.lora.alpha", alpha)
    elif isinstance(alpha, int):
        writer.add_uint32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q = "blk.0.attn_q.weight"


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.ones((rows, columns), np.float32)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({}, VerificationError),
        ({f"{Q}.lora_a": matrix(4, 64)}, VerificationError),
        ({f"{Q}.lora_b": matrix(64, 4)}, VerificationError),
        ({f"{Q}.lora_a": matrix(4, 64), f"{Q}.lora_b": matrix(64, 5)}, IncompatibleError),
        ({f"{Q}.lora_a": matrix(64, 4), f"{Q}.lora_b": matrix(4, 64)}, IncompatibleError),
        ({f"{Q}.lora_a": matrix(4, 32), f"{Q}.lora_b": matrix(64, 4)}, IncompatibleError),
        ({f"{Q}.lora_a": np.ones((2, 4, 64), np.float32), f"{Q}.lora_b": matrix(64, 4)}, IncompatibleError),
        ({"blk.9.attn_q.weight.lora_a": matrix(4, 64), "blk.9.attn_q.weight.lora_b": matrix(64, 4)}, IncompatibleError),
        ({"output_norm.weight.lora_a": matrix(4, 64), "output_norm.weight.lora_b": matrix(1, 4)}, IncompatibleError),
        ({"output_norm.weight": np.ones(64, np.float32)}, IncompatibleError),
        ({"lora_a": matrix(4, 64), "lora_b": matrix(64, 4)}, IncompatibleError),
        ({f"{Q}.lora_a": matrix(4, 64).astype(np.float64), f"{Q}.lora_b": matrix(64, 4)}, IncompatibleError),
    ],
)
def test_an_adapter_whose_tensors_do_not_fit_is_refused(
    tensors: dict[str, np.ndarray], error: type[Exception], base: Path, tmp_path: Path
) -> None:
    header = read_header(write_raw(tmp_path / "a.gguf", tensors))
    with pytest.raises(error, match="'command'"):
        check_adapter(header, read_header(base), "command")


def test_an_adapter_in_a_type_that_llama_cpp_cannot_apply_is_refused(base: Path, tmp_path: Path) -> None:
    a = gguf.quants.quantize(matrix(4, 64), gguf.GGMLQuantizationType.Q4_0)
    path = write_raw(tmp_path / "a.gguf", {f"{Q}.lora_a": a, f"{Q}.lora_b": matrix(64, 4)}, kinds={f"{Q}.lora_a": 2})
    with pytest.raises(IncompatibleError, match="q4_0"):
        check_adapter(read_header(path), read_header(base), "command")


@pytest.mark.parametrize("alpha", [None, 4, np.float64(4), float("nan"), float("inf")])
def test_an_alpha_that_would_abort_llama_cpp_is_refused(alpha: object, base: Path, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_a": matrix(4, 64), f"{Q}.lora_b": matrix(64, 4)}
    header = read_header(write_raw(tmp_path / "a.gguf", tensors, alpha))
    with pytest.raises(VerificationError, match="alpha"):
        check_adapter(header, read_header(base), "command")


def test_the_embedding_takes_its_matrices_the_other_way_round(base: Path, tmp_path: Path) -> None:
    columns, rows = read_header(base).tensors["token_embd.weight"].shape
    name = "token_embd.weight"
    right = {f"{name}.lora_a": matrix(rows, 4), f"{name}.lora_b": matrix(columns, 4)}
    check_adapter(read_header(write_raw(tmp_path / "a.gguf", right)), read_header(base), "command")
    wrong = {f"{name}.lora_a": matrix(4, columns), f"{name}.lora_b": matrix(rows, 4)}
    with pytest.raises(IncompatibleError):
        check_adapter(read_header(write_raw(tmp_path / "b.gguf", wrong)), read_header(base), "command")


@pytest.mark.parametrize("key", ["general.type", "adapter.type"])
def test_a_file_that_is_no_lora_is_refused(key: str, adapter: Path, base: Path) -> None:
    with pytest.raises(VerificationError, match=key):
        check_adapter(changed(read_header(adapter), key, "model"), read_header(base), "command")


@pytest.mark.parametrize("tokens", [7, "7", (-1,), (1.5,), (True,), ("a",)])
def test_invocation_tokens_that_are_none_are_refused(tokens: object, adapter: Path, base: Path) -> None:
    header = changed(read_header(adapter), INVOCATION_TOKENS, tokens)
    with pytest.raises(VerificationError, match="invocation_tokens"):
        check_adapter(header, read_header(base), "command")


LOAD_ALL = """
import sys
from pathlib import Path
from edgetune_runtime import EdgetuneError
from edgetune_runtime.engines.gguf.engine import GgufEngine

loaded = 0
for path in sorted(Path(sys.argv[2]).iterdir()):
    engine = GgufEngine(Path(sys.argv[1]), context_length=32, threads=1)
    try:
        engine.load_adapter("a", path)
        engine.activate({"a": 1.0})
        engine.decode([5, 6, 7])
        loaded += 1
    except EdgetuneError:
        pass
    engine.close()
print(loaded)
"""


def test_flipped_bytes_in_an_adapters_header_never_crash_the_process(adapter: Path, base: Path, tmp_path: Path) -> None:
    data, header, rng = adapter.read_bytes(), read_header(base), random.Random(0)
    start = min(tensor.offset for tensor in read_header(adapter).tensors.values())
    passed = tmp_path / "passed"
    passed.mkdir()
    refused = 0
    for number in range(1500):
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(start)] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped.gguf"
        path.write_bytes(flipped)
        try:
            check_adapter(read_header(path), header, "command")
        except (VerificationError, IncompatibleError):
            refused += 1
        else:
            path.rename(passed / f"{number:04}.gguf")
    assert refused > 750
    # What passed has to be harmless: llama.cpp loads it, or says no, in a process of its own that has to survive.
    command = [sys.executable, "-c", LOAD_ALL, str(base), str(passed)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 0


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


def test_an_embedding_for_the_inputs_of_each_layer_decides_neither_the_main_type_nor_the_output_share() -> None:
    def matrix(name: str, kind: str, rows: int) -> TensorInfo:
        return TensorInfo(name, (256, rows), TENSOR_TYPES[kind].number, 0, 0)

    whole = [
        matrix("token_embd.weight", "q6_k", 100),
        matrix("blk.0.ffn_up.weight", "q4_0", 300),
        matrix(PER_LAYER_EMBEDDING, "q6_k", 9000),
    ]
    header = GgufHeader({}, {tensor.name: tensor for tensor in whole})
    assert (header.main_type.name, header.output_share) == ("q4_0", 0.25)
    assert header.values_by_type == {"q6_k": 256 * 9100, "q4_0": 256 * 300}
