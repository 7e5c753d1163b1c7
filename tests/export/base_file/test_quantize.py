from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from edgetune_export.base_file.quantize import dequantize_rows, quantize_gguf, quantize_rows
from edgetune_runtime.errors import IncompatibleError, OutOfSpaceError, UsageError, VerificationError
from edgetune_runtime.formats.gguf_file import TensorInfo, read_header
from edgetune_runtime.formats.quantization import QUANTIZATIONS, TENSOR_TYPES

WEIGHT = "blk.0.ffn_up.weight"
NUMBERS = {name: kind.number for name, kind in TENSOR_TYPES.items()}


@pytest.mark.parametrize(
    ("quantization", "held"), [("f32", "f32"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_1", "q4_1")]
)
def test_a_quantization_gives_its_type(
    quantization: str, held: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize_gguf(tiny_gguf("qwen2"), tmp_path / "out.gguf", quantization)
    assert read_header(tmp_path / "out.gguf").main_type.name == held
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_quantization_runs_without_an_importance_matrix(
    quantization: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize_gguf(tiny_gguf("llama"), tmp_path / "out.gguf", quantization)
    assert read_header(tmp_path / "out.gguf").metadata["general.file_type"] == QUANTIZATIONS[quantization].ftype


@pytest.mark.parametrize(("arch", "output"), [("llama", "token_embd.weight"), ("qwen2", "output.weight")])
def test_the_output_layer_can_have_another_type(
    arch: str, output: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize_gguf(tiny_gguf(arch), tmp_path / "out.gguf", "q5_0+q4_0")
    tensors = read_header(tmp_path / "out.gguf").tensors.values()
    types = {tensor.name: tensor.type.name for tensor in tensors if len(tensor.shape) > 1}
    assert types.pop(output) == "q4_0"
    assert set(types.values()) == {"q5_0"}


def test_a_fallback_is_described_as_what_it_is(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    quantize_gguf(tiny_gguf("llama"), tmp_path / "out.gguf", "q4_k_m")
    assert read_header(tmp_path / "out.gguf").main_type.name == "q5_0"


def test_an_unknown_quantization_names_the_known_ones(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'q4'.*q4_k_m"):
        quantize_gguf(tiny_gguf("llama"), tmp_path / "out.gguf", "q4")


def test_a_quantized_source_is_refused(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    quantize_gguf(tiny_gguf("llama"), tmp_path / "q8.gguf", "q8_0")
    with pytest.raises(IncompatibleError, match="already quantized to q8_0"):
        quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0")


def test_a_source_that_llama_cpp_refuses_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((64, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VerificationError, match=r"llama\.cpp cannot quantize"):
        quantize_gguf(source, tmp_path / "out.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_full_disk_is_told_apart_from_a_bad_file(
    tiny_gguf: Callable[[str], Path], small_disk: Path, tmp_path: Path
) -> None:
    with (small_disk / "filler").open("wb") as file:
        file.write(b"\0" * (2 * 2**20 - 2**16))
    with pytest.raises(OutOfSpaceError, match="free some space"):
        quantize_gguf(tiny_gguf("llama"), small_disk / "out.gguf", "f32")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q5_1", "q4_0", "q4_1"])
def test_rows_are_quantized_as_the_whole_file_is(
    quantization: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tiny_gguf("llama"), tmp_path / "out.gguf"
    quantize_gguf(source, out, quantization)
    place, quantized = read_header(source).tensors[WEIGHT], read_header(out).tensors[WEIGHT]
    values = np.frombuffer(source.read_bytes(), np.float16, place.nbytes // 2, place.offset).astype(np.float32)
    data = quantize_rows(values.reshape(place.shape[::-1]), NUMBERS[quantization])
    assert data == out.read_bytes()[quantized.offset : quantized.offset + quantized.nbytes]


@pytest.mark.parametrize(("kind", "error"), [("q4_k", 0.1), ("q5_k", 0.05), ("q6_k", 0.025), ("iq4_xs", 0.15)])
def test_k_quants_come_back_within_their_precision(kind: str, error: float) -> None:
    values = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    data = np.frombuffer(quantize_rows(values, NUMBERS[kind]), np.uint8).reshape(3, -1)
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(NUMBERS[kind]))
    assert 0 < np.sqrt(np.mean((back - values) ** 2)) < error


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="40 values as q8_0"):
        quantize_rows(np.zeros((2, 40), np.float32), NUMBERS["q8_0"])
    with pytest.raises(IncompatibleError, match="iq2_xxs"):
        quantize_rows(np.zeros((2, 256), np.float32), NUMBERS["iq2_xxs"])


@pytest.mark.parametrize(
    "name", ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
)
def test_dequantized_values_are_those_of_the_gguf_package_bit_for_bit(name: str) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (6, 512)).astype(np.float32)
    data = quantize_rows(values, NUMBERS[name])
    tensor = TensorInfo("a", (512, 6), NUMBERS[name], 0, len(data))
    raw = np.frombuffer(data, np.uint8).reshape(6, -1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(NUMBERS[name]))
    assert dequantize_rows(data, tensor).tobytes() == expected.tobytes()


def test_a_tensor_that_ends_early_or_is_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(VerificationError, match="a has 33 bytes of 34"):
        dequantize_rows(bytes(33), TensorInfo("a", (32, 1), NUMBERS["q8_0"], 0, 34))
    with pytest.raises(IncompatibleError, match="which are of type i64"):
        dequantize_rows(bytes(8), TensorInfo("a", (1, 1), NUMBERS["i64"], 0, 8))
