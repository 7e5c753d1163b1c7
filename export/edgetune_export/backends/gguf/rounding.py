"""A base's tensor and new values in, the tensor's new bytes out: by chance where the nearest points lose the change."""

from __future__ import annotations

import zlib

import numpy as np
from edgetune_runtime.formats.gguf_file import TensorInfo

from edgetune_export.adapters.shapes import Floats

from .quantize import quantize_rows

_BLOCK = np.dtype([("step", "<f2"), ("steps", "i1", 32)])
_MOST_STEPS = 127
_SMALL = 0.5
"""Mean change, in steps, below which the nearest point undoes more than it keeps."""


def rounded(data: bytes, tensor: TensorInfo, values: Floats) -> bytes:
    """The bytes of `values` [rows, columns] in the type of a base's tensor, whose own bytes are `data`.

    A base's weights are points of its grid, so the nearest point undoes a change of less than half a step. Where most
    in a q8_0 tensor are as small as that, a value is rounded up or down with the odds of its distance, so that many
    changes together keep their sum: stochastic rounding, Gupta et al. 2015, arXiv:1502.02551. With fewer bits a step is
    so large that its noise does more harm. The same values give the same bytes.

    Raises what `quantize_rows` raises.
    """
    nearest = quantize_rows(values, tensor.ggml_type)
    if tensor.type_name != "q8_0":
        return nearest
    blocks = np.frombuffer(data, _BLOCK).copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        places = values.reshape(-1, 32) / blocks["step"].astype(np.float32)[:, None]
    on_grid = np.isfinite(places).all(axis=1)
    change = np.abs(places - blocks["steps"])[on_grid]
    if not change.size or change.mean() >= _SMALL:
        return nearest
    odds = np.random.default_rng(zlib.crc32(tensor.name.encode())).random(places.shape, np.float32)
    chosen = np.floor(np.where(on_grid[:, None], places, 0) + odds).clip(-_MOST_STEPS, _MOST_STEPS)
    blocks["steps"] = chosen.astype(np.int8)
    # What has left the range of a block's step needs another step.
    others = ~on_grid | (np.abs(places - chosen) >= 1).any(axis=1)
    blocks[others] = np.frombuffer(nearest, _BLOCK)[others]
    return blocks.tobytes()
