from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from edgetune_export.adapters.shapes import Floats
from edgetune_export.base_file.quantize import dequantize_rows, quantize_rows
from edgetune_export.base_file.rounding import rounded, rounded_on_grid
from edgetune_runtime.formats.gguf_file import TensorInfo
from edgetune_runtime.formats.quantization import TENSOR_TYPES

NUMBERS = {name: kind.number for name, kind in TENSOR_TYPES.items()}
STEP = 1 / 127
Rounding = Callable[[bytes, TensorInfo, Floats], bytes]
ROWS, COLUMNS = 64, 512


def base_of(kind: str = "q8_0", seed: int = 0) -> tuple[bytes, TensorInfo]:
    """Random weights between -1 and 1 in a type, and what a header says of them."""
    values = np.random.default_rng(seed).uniform(-1, 1, (ROWS, COLUMNS)).astype(np.float32)
    data = quantize_rows(values, NUMBERS[kind])
    return data, TensorInfo("blk.0.ffn_up.weight", (COLUMNS, ROWS), NUMBERS[kind], 0, len(data))


def test_the_base_itself_stays_byte_for_byte() -> None:
    data, tensor = base_of()
    assert rounded(data, tensor, dequantize_rows(data, tensor)) == data


@pytest.mark.parametrize("rounding", [rounded, rounded_on_grid])
def test_many_small_changes_keep_their_sum_which_the_nearest_points_lose(rounding: Rounding) -> None:
    data, tensor = base_of()
    base = dequantize_rows(data, tensor)
    change = np.zeros_like(base)
    change[:, ::2] = 0.05 * STEP
    made = dequantize_rows(rounding(data, tensor, base + change), tensor) - base
    nearest = dequantize_rows(quantize_rows(base + change, NUMBERS["q8_0"]), tensor) - base
    # The sum over 16,384 weights, each of which moves by a step with odds of 1 in 20.
    assert made[:, ::2].mean() == pytest.approx(0.05 * STEP, rel=0.1)
    assert abs(nearest[:, ::2].mean()) < 0.01 * STEP
    # Nothing moves by more than a step, and the others not at all.
    assert np.abs(made[:, ::2]).max() < 1.1 * STEP
    assert np.abs(made[:, 1::2]).max() < 1e-3 * STEP


def test_large_changes_take_the_nearest_points_and_other_scales() -> None:
    data, tensor = base_of()
    other = dequantize_rows(*base_of(seed=1))
    assert rounded(data, tensor, other * 3) == quantize_rows(other * 3, NUMBERS["q8_0"])


def test_a_block_that_leaves_its_range_takes_another_scale_alone() -> None:
    data, tensor = base_of()
    values = dequantize_rows(data, tensor)
    values[5, 32:64] *= 4
    found = dequantize_rows(rounded(data, tensor, values), tensor)
    assert np.abs(found - values)[5, 32:64].max() <= 4 * STEP
    values[5, 32:64] = found[5, 32:64] = 0
    np.testing.assert_array_equal(found, values)


def test_zeros_in_the_base_can_be_changed() -> None:
    data = quantize_rows(np.zeros((1, 64), np.float32), NUMBERS["q8_0"])
    tensor = TensorInfo("blk.0.ffn_up.weight", (64, 1), NUMBERS["q8_0"], 0, len(data))
    values = np.zeros((1, 64), np.float32)
    values[0, :32] = 0.25
    np.testing.assert_allclose(dequantize_rows(rounded(data, tensor, values), tensor), values, rtol=1e-3)


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q6_k"])
def test_other_types_take_the_nearest_points(kind: str) -> None:
    data, tensor = base_of(kind)
    values = dequantize_rows(data, tensor) + np.float32(0.001)
    assert rounded(data, tensor, values) == quantize_rows(values, NUMBERS[kind])


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q4_k", "q6_k"])
def test_on_its_grid_a_tensor_keeps_its_scales_and_the_sum_of_small_changes(kind: str) -> None:
    data, tensor = base_of(kind)
    base = dequantize_rows(data, tensor)
    assert rounded_on_grid(data, tensor, base) == data
    change = np.float32(0.01)
    made = dequantize_rows(rounded_on_grid(data, tensor, base + change), tensor) - base
    # Values at the end of their block's range cannot grow.
    assert 0.8 * change < made.mean() < 1.05 * change
