"""Adapter files that onnxruntime wrote, whole and damaged."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from edgetune_export.backends.onnx.adapter import write_tensors
from edgetune_runtime import VerificationError
from edgetune_runtime.engines.onnx.arrays import model_version
from edgetune_runtime.formats import onnx_adapter
from edgetune_runtime.formats.onnx_adapter import adapter_arrays

FINGERPRINT = "ab" * 32
TENSORS = {
    "layers.0.lora_A.weight": np.arange(24, dtype=np.float32).reshape(8, 3),
    "layers.0.lora_B.weight": -np.arange(6, dtype=np.float32).reshape(3, 2),
    "bias": np.ones(5, np.float32),
}

REFUSED = r"adapter 'x' is not an \.onnx_adapter file"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tensors(TENSORS, tmp_path / "x.onnx_adapter", dtype="f32", base_fingerprint=FINGERPRINT)
    return tmp_path / "x.onnx_adapter"


def test_tensors_are_read_as_onnxruntime_reads_them(file: Path) -> None:
    expected = onnxruntime.AdapterFormat.read_adapter(str(file))
    arrays, version = adapter_arrays(file, "x")
    assert version == expected.get_model_version() == model_version(FINGERPRINT)
    parameters = expected.get_parameters()
    assert arrays.keys() == parameters.keys() == TENSORS.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, parameters[name].numpy())
        assert np.array_equal(array, TENSORS[name])
        assert array.dtype == np.float32


def test_tensors_are_views_of_the_file(file: Path) -> None:
    arrays, _ = adapter_arrays(file, "x")
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays.values())
    # An installer replaces the file; the mapped one stays.
    other = file.with_name("other")
    write_tensors({name: 2 * array for name, array in TENSORS.items()}, other, dtype="f32", base_fingerprint="cd" * 32)
    other.replace(file)
    assert np.array_equal(arrays["bias"], TENSORS["bias"])
    assert np.array_equal(adapter_arrays(file, "x")[0]["bias"], 2 * TENSORS["bias"])


def test_items_that_point_to_one_tensor_are_refused_at_the_first(file: Path) -> None:
    data = bytearray(file.read_bytes())
    first, _ = onnx_adapter._vector(onnx_adapter._table(data, 0), 3, item_bytes=4)
    (offset,) = struct.unpack_from("<I", data, first)
    struct.pack_into("<I", data, first + 4, offset - 4)
    file.write_bytes(data)
    with pytest.raises(VerificationError, match=f"{REFUSED}: two tensors '"):
        adapter_arrays(file, "x")


def test_a_tensor_with_a_long_name_is_refused(tmp_path: Path) -> None:
    write_tensors({"x" * 1001: TENSORS["bias"]}, tmp_path / "x", dtype="f32", base_fingerprint=FINGERPRINT)
    with pytest.raises(VerificationError, match="name has 1001 bytes, more than 1000"):
        adapter_arrays(tmp_path / "x", "x")


def test_half_precision_is_read_too(tmp_path: Path) -> None:
    write_tensors(TENSORS, tmp_path / "x", dtype="f16", base_fingerprint=FINGERPRINT)
    arrays, _ = adapter_arrays(tmp_path / "x", "x")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(file: Path) -> None:
    whole = file.read_bytes()
    # The last bytes are padding.
    for length in range(len(whole) - 8):
        file.write_bytes(whole[:length])
        with pytest.raises(VerificationError, match=REFUSED):
            adapter_arrays(file, "x")


def test_wrong_bytes_are_refused_or_give_tensors_inside_the_file(file: Path) -> None:
    whole, chance = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 4))):
            damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 4, 127, 128, 255))
        file.with_name("damaged").write_bytes(damaged)
        try:
            arrays, _ = adapter_arrays(file.with_name("damaged"), "x")
        except VerificationError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert sum(array.nbytes for array in arrays.values()) <= len(TENSORS) * len(whole)
    assert refused > 300


@pytest.mark.parametrize("data", [b"", b"GGUF", b"\x0c\0\0\0TORT" + bytes(40), bytes(100), b"\xff" * 100])
def test_other_files_are_refused(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    with pytest.raises(VerificationError, match=REFUSED):
        adapter_arrays(file, "x")


def test_a_tensor_with_more_axes_than_an_adapter_has_is_refused(tmp_path: Path) -> None:
    write_tensors({"x": np.ones((1,) * 64, np.float32)}, tmp_path / "x", dtype="f32", base_fingerprint=FINGERPRINT)
    with pytest.raises(VerificationError, match=f"{REFUSED}: 'x' has 64 axes, more than 4; build the bundle again"):
        adapter_arrays(tmp_path / "x", "x")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="No such file"):
        adapter_arrays(tmp_path / "x", "x")


WITHOUT = """
import sys
sys.modules["flatbuffers"] = None
from edgetune_runtime import IncompatibleError, engines
try:
    engines.load("onnx")
except IncompatibleError as error:
    print(error)
"""


def test_without_flatbuffers_the_error_says_what_to_install() -> None:
    told = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True).stdout
    expected = 'ONNX bundles need flatbuffers, which is not installed; run: pip install "edgetune-runtime[onnx]"\n'
    assert told == expected
