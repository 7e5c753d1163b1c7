"""Requantizes changed tensors of the base, on its grid if rounding to nearest would undo the change."""

from __future__ import annotations

import numpy as np
from edgetune_runtime.formats.gguf_file import TensorInfo
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune_export.adapters.shapes import Floats

from .grid import dither_of, grid_of, with_codes
from .quantize import dequantize_rows, quantize_rows

_SMALL = 0.5
"""Mean change, in quantization steps, below which rounding to nearest undoes more than it keeps."""


def rounded_on_grid(data: bytes, tensor: TensorInfo, values: Floats) -> bytes:
    """`values` [rows, columns] rounded as in training: the scales of the base's bytes `data`, and `dither_of`.

    Tensors of floats are written as they are. Raises what `grid_of` raises.
    """
    if tensor.type.is_float:
        return quantize_rows(values, tensor.ggml_type)
    raw = np.frombuffer(data, np.uint8)
    return with_codes(raw, tensor, grid_of(raw, tensor).codes(values, dither_of(tensor))).tobytes()


def rounded(data: bytes, tensor: TensorInfo, values: Floats) -> bytes:
    """Quantize `values` [rows, columns] to the type of a base's tensor, whose current bytes are `data`.

    A base's weights are on the quantization grid, so rounding to nearest undoes a change of less than half a step. If
    most changes in a q8_0 tensor are that small, values are rounded on the grid. With fewer bits the steps are so large
    that its noise does more harm than good, unless training knows it. The same values give the same bytes.

    Raises what `quantize_rows` raises.
    """
    nearest = quantize_rows(values, tensor.ggml_type)
    if tensor.type != TENSOR_TYPES["q8_0"]:
        return nearest
    raw, shape = np.frombuffer(data, np.uint8), (-1, tensor.type.block)
    grid = grid_of(raw, tensor)
    has_step = (grid.step != 0).ravel()
    positions = grid.positions(values).reshape(shape)
    moves = np.abs(positions - grid.positions(dequantize_rows(data, tensor)).reshape(shape))[has_step]
    if not moves.size or moves.mean() >= _SMALL:
        return nearest
    codes = grid.codes(values, dither_of(tensor))
    # Blocks with values outside the range of their step need another step.
    outside = ~has_step | (np.abs(positions - codes.reshape(shape)) >= 1).any(axis=1)
    blocks = with_codes(raw, tensor, codes).reshape(-1, tensor.type.block_bytes)
    blocks[outside] = np.frombuffer(nearest, np.uint8).reshape(blocks.shape)[outside]
    return blocks.tobytes()
