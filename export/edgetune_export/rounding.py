"""A base's tensor and new values in, the tensor's new bytes out: by chance where the nearest points lose the change."""

from __future__ import annotations

import zlib

import numpy as np
from edgetune_runtime.gguf_file import TensorInfo
from numpy.typing import NDArray

from .quantize import quantize_rows
from .shapes import Floats

# Blocks of 32 weights: a step, for some types the lowest value, and the numbers of steps.
_BLOCKS = {
    "q8_0": np.dtype([("step", "<f2"), ("steps", "i1", 32)]),
    "q4_0": np.dtype([("step", "<f2"), ("steps", "u1", 16)]),
    "q4_1": np.dtype([("step", "<f2"), ("lowest", "<f2"), ("steps", "u1", 16)]),
}
_RANGES = {"q8_0": (-127, 127), "q4_0": (-8, 7), "q4_1": (0, 15)}
_SMALL = 0.5
"""Mean change, in steps, below which the nearest point undoes more than it keeps."""


def rounded(data: bytes, tensor: TensorInfo, values: Floats) -> bytes:
    """The bytes of `values` [rows, columns] in the type of a base's tensor, whose own bytes are `data`.

    A base's weights are points of its grid, so the nearest point undoes a change of less than half a step. Where most
    are as small as that, a value is rounded up or down with the odds of its distance, so that many changes together
    keep their sum: stochastic rounding, Gupta et al. 2015, arXiv:1502.02551. The same values give the same bytes.

    Raises what `quantize_rows` raises.
    """
    nearest = quantize_rows(values, tensor.ggml_type)
    kind = tensor.type_name
    if kind not in _BLOCKS:
        return nearest
    blocks = np.frombuffer(data, _BLOCKS[kind]).copy()
    lowest = blocks["lowest"].astype(np.float32) if kind == "q4_1" else np.zeros(len(blocks), np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = (values.reshape(-1, 32) - lowest[:, None]) / blocks["step"].astype(np.float32)[:, None]
    on_grid = np.isfinite(places).all(axis=1)
    change = np.abs(places - _numbers(blocks, kind))[on_grid]
    if not change.size or change.mean() >= _SMALL:
        return nearest
    odds = np.random.default_rng(zlib.crc32(tensor.name.encode())).random(places.shape, np.float32)
    chosen = np.floor(np.where(on_grid[:, None], places, 0) + odds).clip(*_RANGES[kind])
    _put(blocks, kind, chosen.astype(np.int8))
    # What has left the range of a block's step needs another step.
    others = ~on_grid | (np.abs(places - chosen) >= 1).any(axis=1)
    blocks[others] = np.frombuffer(nearest, _BLOCKS[kind])[others]
    return blocks.tobytes()


def _numbers(blocks: NDArray[np.void], kind: str) -> NDArray[np.int8]:
    """How many steps each weight of the blocks is, [blocks, 32]."""
    steps = blocks["steps"]
    if kind == "q8_0":
        return np.asarray(steps)
    halves = np.concatenate([steps & 15, steps >> 4], axis=1).astype(np.int8)
    return halves + np.int8(_RANGES[kind][0])


def _put(blocks: NDArray[np.void], kind: str, numbers: NDArray[np.int8]) -> None:
    """Write what `_numbers` reads."""
    if kind == "q8_0":
        blocks["steps"] = numbers
        return
    halves = (numbers - np.int8(_RANGES[kind][0])).astype(np.uint8)
    blocks["steps"] = halves[:, :16] | halves[:, 16:] << 4
