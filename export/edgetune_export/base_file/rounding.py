"""Requantizes changed tensors of the base, with stochastic rounding if rounding to nearest would undo the change."""

from __future__ import annotations

import zlib

import numpy as np
from edgetune_runtime.formats.gguf_file import TensorInfo
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune_export.adapters.shapes import Floats

from .quantize import quantize_rows

_Q8_0 = TENSOR_TYPES["q8_0"]
_BLOCK = np.dtype([("step", "<f2"), ("steps", "i1", _Q8_0.block)])
_MAX_STEPS = 127
_SMALL = 0.5
"""Mean change, in quantization steps, below which rounding to nearest undoes more than it keeps."""


def rounded(data: bytes, tensor: TensorInfo, values: Floats) -> bytes:
    """Quantize `values` [rows, columns] to the type of a base's tensor, whose current bytes are `data`.

    A base's weights are on the quantization grid, so rounding to nearest undoes a change of less than half a step. If
    most changes in a q8_0 tensor are that small, values are rounded up or down with probabilities that keep their mean:
    stochastic rounding, Gupta et al. 2015, arXiv:1502.02551. With fewer bits the steps are so large that its noise does
    more harm than good. The same values give the same bytes.

    Raises what `quantize_rows` raises.
    """
    nearest = quantize_rows(values, tensor.ggml_type)
    if tensor.type != _Q8_0:
        return nearest
    blocks = np.frombuffer(data, _BLOCK).copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        in_steps = values.reshape(-1, _Q8_0.block) / blocks["step"].astype(np.float32)[:, None]
    on_grid = np.isfinite(in_steps).all(axis=1)
    change = np.abs(in_steps - blocks["steps"])[on_grid]
    if not change.size or change.mean() >= _SMALL:
        return nearest
    noise = np.random.default_rng(zlib.crc32(tensor.name.encode())).random(in_steps.shape, np.float32)
    chosen = np.floor(np.where(on_grid[:, None], in_steps, 0) + noise).clip(-_MAX_STEPS, _MAX_STEPS)
    blocks["steps"] = chosen.astype(np.int8)
    # Blocks with values outside the range of their step need another step.
    outside = ~on_grid | (np.abs(in_steps - chosen) >= 1).any(axis=1)
    blocks[outside] = np.frombuffer(nearest, _BLOCK)[outside]
    return blocks.tobytes()
