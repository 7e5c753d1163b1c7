"""The quantization grid of a GGUF tensor: the values that its blocks can store with the scales that they have.

The layouts of the blocks are those of llama.cpp's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import numpy.typing as npt
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import TensorInfo

from edgetune_export.adapters.shapes import Floats
from edgetune_export.architectures.layout import Order, in_groups

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """The values `step · code + offset` with codes from `lowest` to `highest`.

    `step` and `offset` are float32 [rows, groups, 1]: neighbours in a row share them, as many as a row has columns per
    group.
    """

    step: Floats
    offset: Floats
    lowest: int
    highest: int

    @property
    def inverse(self) -> Floats:
        """1 / step; 0 where all codes stand for the same value."""
        return np.divide(1, self.step, out=np.zeros_like(self.step), where=self.step != 0)

    def with_columns(self, order: Order) -> Grid:
        """The grid with column i moved to `order[i]`; IncompatibleError if this splits groups."""
        back = np.argsort(in_groups(order, len(order) // self.step.shape[1]))
        return Grid(self.step[:, back], self.offset[:, back], self.lowest, self.highest)

    def positions(self, values: Floats) -> Floats:
        """Where the values [rows, columns] lie, in codes that need not be whole or within range."""
        grouped: Floats = (values.reshape(*self.step.shape[:2], -1) - self.offset) * self.inverse
        return grouped.reshape(values.shape)

    def codes(self, values: Floats, dither: Floats) -> Bytes:
        """The codes [rows, columns] of values that are rounded down after `dither` steps, from 0 to 1, are added."""
        codes: Bytes = np.floor(self.positions(values) + dither).clip(self.lowest, self.highest).astype(np.uint8)
        return codes


def grid_of(data: Bytes, tensor: TensorInfo) -> Grid:
    """The grid of a tensor whose bytes are `data`; IncompatibleError if its type has none."""
    layout = _layout(tensor)
    step, offset = layout.scales(data.reshape(-1, tensor.type.block_bytes))
    rows = tensor.shape[-1]
    return Grid(_per_row(step, rows), _per_row(offset, rows), layout.lowest, layout.highest)


def dither_of(tensor: TensorInfo) -> Floats:
    """Fixed random numbers [rows, columns] between 0 and 1, never closer to them than float errors of codes.

    With them, a change of a tenth of a step moves a tenth of the values to the next code: stochastic rounding, Gupta et
    al. 2015, arXiv:1502.02551. Rounding to nearest would undo it, because a base's own weights are on the grid.
    """
    numbers = np.random.default_rng(zlib.crc32(tensor.name.encode())).integers(0, 256, tensor.shape[::-1], np.uint8)
    return (numbers + np.float32(0.5)) / np.float32(256)


def with_codes(data: Bytes, tensor: TensorInfo, codes: Bytes) -> Bytes:
    """The bytes of the tensor with other codes [rows, columns] and the scales of `data`."""
    blocks = data.reshape(-1, tensor.type.block_bytes).copy()
    _layout(tensor).put(blocks, codes.reshape(-1, tensor.type.block))
    return blocks.reshape(data.shape)


@dataclass(frozen=True)
class _Layout:
    """A type's highest and lowest code, how to read step and offset [blocks, groups] of its blocks, and how to write
    codes."""

    highest: int
    scales: Callable[[Bytes], tuple[Floats, Floats]]
    put: Callable[[Bytes, Bytes], None]
    lowest: int = 0


def _layout(tensor: TensorInfo) -> _Layout:
    layout = _LAYOUTS.get(tensor.type.name)
    if layout is None:
        message = f"{tensor.name} is {tensor.type.name}, which has no grid"
        raise IncompatibleError(message, "set merged_quantization: q8_0, or quantize the base to q4_0 or q4_k_m")
    return layout


def _per_row(values: Floats, rows: int) -> Floats:
    return np.ascontiguousarray(values, np.float32).reshape(rows, -1, 1)


def _halves(blocks: Bytes, start: int) -> Floats:
    """The f16 number at byte `start` of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _symmetric(blocks: Bytes, zero: int) -> tuple[Floats, Floats]:
    step = _halves(blocks, 0)
    return step, step * np.float32(-zero)


def _affine(blocks: Bytes) -> tuple[Floats, Floats]:
    return _halves(blocks, 0), _halves(blocks, 2)


def _scales_of_k(blocks: Bytes) -> tuple[Floats, Floats]:
    """The scales of q4_k and q5_k: two f16, multiplied by 6 bits for each of 8 groups."""
    scale, least = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return _halves(blocks, 0) * scale, -_halves(blocks, 2) * least


def _scales_of_q6_k(blocks: Bytes) -> tuple[Floats, Floats]:
    step = _halves(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return step, step * np.float32(-32)


def _put_q8(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = codes ^ 0x80


def _put_q4(blocks: Bytes, codes: Bytes, start: int) -> None:
    first, second = np.split(codes & 0x0F, 2, axis=1)
    blocks[:, start:] = first | second << 4


def _put_q5(blocks: Bytes, codes: Bytes, start: int) -> None:
    blocks[:, start : start + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
    _put_q4(blocks, codes, start + 4)


def _put_q4_k(blocks: Bytes, codes: Bytes, start: int = 16) -> None:
    pairs = (codes & 0x0F).reshape(-1, 4, 2, 32)
    blocks[:, start:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _put_q5_k(blocks: Bytes, codes: Bytes) -> None:
    high = (codes >> 4).reshape(-1, 8, 32)
    blocks[:, 16:48] = np.packbits(high, axis=1, bitorder="little").reshape(-1, 32)
    _put_q4_k(blocks, codes, 48)


def _put_q6_k(blocks: Bytes, codes: Bytes) -> None:
    quarters = codes.reshape(-1, 2, 4, 32)
    low, high = quarters & 0x0F, quarters >> 4
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)
    blocks[:, 128:192] = np.bitwise_or.reduce(high << shifts, axis=2).reshape(-1, 64)


_LAYOUTS: Mapping[str, _Layout] = {
    # llama.cpp itself never writes -128, the lowest code.
    "q8_0": _Layout(255, partial(_symmetric, zero=128), _put_q8, lowest=1),
    "q5_0": _Layout(31, partial(_symmetric, zero=16), partial(_put_q5, start=2)),
    "q5_1": _Layout(31, _affine, partial(_put_q5, start=4)),
    "q4_0": _Layout(15, partial(_symmetric, zero=8), partial(_put_q4, start=2)),
    "q4_1": _Layout(15, _affine, partial(_put_q4, start=4)),
    "q6_k": _Layout(63, _scales_of_q6_k, _put_q6_k),
    "q5_k": _Layout(31, _scales_of_k, _put_q5_k),
    "q4_k": _Layout(15, _scales_of_k, _put_q4_k),
}
