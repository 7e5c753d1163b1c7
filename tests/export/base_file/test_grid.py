"""The quantization grid of a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from edgetune_export.base_file.grid import dither_of, grid_of, with_codes
from edgetune_export.base_file.quantize import dequantize_rows, quantize_rows
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import TensorInfo
from edgetune_runtime.formats.quantization import TENSOR_TYPES

TYPES = ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")
ROWS, COLUMNS = 6, 512


def quantized(kind: str) -> tuple[np.ndarray[Any, Any], TensorInfo]:
    values = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    values[0, :256] = 0  # blocks whose step is 0
    number = TENSOR_TYPES[kind].number
    data = np.frombuffer(quantize_rows(values, number), np.uint8)
    return data, TensorInfo("blk.0.ffn_up.weight", (COLUMNS, ROWS), number, 0, len(data))


@pytest.mark.parametrize("kind", TYPES)
def test_every_code_reads_back_as_the_value_on_the_grid(kind: str) -> None:
    data, tensor = quantized(kind)
    grid = grid_of(data, tensor)
    codes = np.random.default_rng(1).integers(grid.lowest, grid.highest + 1, (ROWS, COLUMNS)).astype(np.uint8)
    values = dequantize_rows(with_codes(data, tensor, codes), tensor)
    expected = (grid.step * codes.reshape(*grid.step.shape[:2], -1) + grid.offset).reshape(ROWS, COLUMNS)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", TYPES)
def test_the_tensors_own_values_give_its_own_bytes(kind: str) -> None:
    data, tensor = quantized(kind)
    values = dequantize_rows(data, tensor)
    again = with_codes(data, tensor, grid_of(data, tensor).codes(values, dither_of(tensor)))
    np.testing.assert_array_equal(dequantize_rows(again, tensor), values)


def test_a_type_without_a_grid_is_refused_with_the_remedy() -> None:
    kind = TENSOR_TYPES["iq4_nl"]
    tensor = TensorInfo("blk.0.ffn_up.weight", (COLUMNS, ROWS), kind.number, 0, 18)
    with pytest.raises(IncompatibleError, match="iq4_nl, which has no grid") as caught:
        grid_of(np.zeros(18, np.uint8), tensor)
    assert "merged_quantization: q8_0" in caught.value.remedy
