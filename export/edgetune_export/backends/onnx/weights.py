"""Converts GGUF matrices to weights of ONNX Runtime's MatMulNBits, with the same numbers if the type allows it.

MatMulNBits stores blocks of 32 weights as scale · (q - zero), with a zero point of 8 (4 bits) or 128 (8 bits) by
default. GGUF's q4_0, q5_0 and q8_0 blocks are the same, so their numbers do not change. Other types have an offset, or
scales for fewer weights; rounded to 8 bits, they are within about 1/30 of a 4-bit step, or 1/17 if all weights of a
block have the same sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from edgetune_runtime.formats.gguf_file import TensorInfo

from edgetune_export.adapters.shapes import Floats
from edgetune_export.architectures.layout import Order, in_groups
from edgetune_export.base_file.quantize import dequantize_rows

BLOCK = 32


@dataclass(frozen=True)
class PackedWeights:
    """Weights of `rows` outputs: `data` uint8 [rows, blocks, 32 · bits / 8], `scales` float32 [rows, blocks]."""

    data: npt.NDArray[np.uint8]
    scales: Floats

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return int(self.data.shape[0])

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return int(self.data.shape[1]) * BLOCK

    @property
    def bits(self) -> int:
        """Bits per weight: 4 or 8."""
        return int(self.data.shape[2]) * 8 // BLOCK


def packed_bits(tensor: TensorInfo) -> int | None:
    """Bits per weight of a matrix of this type after `pack`; None for floats."""
    return None if tensor.type.is_float else tensor.type.onnx_bits or 8


def pack(data: bytes, tensor: TensorInfo) -> PackedWeights | None:
    """The matrix with the bytes `data`, in `packed_bits`; None for floats, and for columns not divisible by 32."""
    columns, rows = tensor.shape
    if tensor.type.is_float or columns % BLOCK:
        return None
    if tensor.type.onnx_bits is None:
        return pack_floats(dequantize_rows(data, tensor))
    blocks = np.frombuffer(data, np.uint8).reshape(rows, columns // BLOCK, -1)
    if tensor.type.name == "q4_0":
        scales, levels = _split_scale(blocks)
        # GGUF pairs weight i with i + 16 in a byte, MatMulNBits pairs neighbours.
        return PackedWeights(_join_nibbles(_gguf_nibbles(levels)), scales)
    if tensor.type.name == "q5_0":
        scales, rest = _split_scale(blocks)
        high = np.unpackbits(rest[..., :4], axis=-1, bitorder="little")
        fives = _gguf_nibbles(rest[..., 4:]) | (high << 4)
        return PackedWeights((fives + 128 - 16).astype(np.uint8), scales)
    scales, signed = _split_scale(blocks)
    return PackedWeights(signed ^ np.uint8(128), scales)


def pack_floats(values: Floats) -> PackedWeights:
    """Round float32 [rows, columns] to 8 bits per weight, scaled to each block's maximum; 32 must divide `columns`."""
    rows, columns = values.shape
    blocks = values.reshape(rows, columns // BLOCK, BLOCK)
    scales = np.abs(blocks).max(-1) / np.float32(127)
    divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
    levels = np.rint(blocks / divisors).astype(np.int16) + 128
    return PackedWeights(levels.astype(np.uint8), scales.astype(np.float32))


def widen(packed: PackedWeights) -> PackedWeights:
    """The same numbers in 8 bits per weight."""
    if packed.bits == 8:
        return packed
    levels = np.stack([packed.data & 15, packed.data >> 4], -1).reshape(packed.rows, -1, BLOCK)
    return PackedWeights(levels + np.uint8(128 - 8), packed.scales)


def reorder(packed: PackedWeights, rows: Order | None, columns: Order | None) -> PackedWeights:
    """Move row i to `rows[i]` and column i to `columns[i]`; IncompatibleError if this splits blocks."""
    data, scales = packed.data, packed.scales
    if rows is not None:
        back = np.argsort(rows)
        data, scales = data[back], scales[back]
    if columns is not None:
        back = np.argsort(in_groups(columns, BLOCK))
        data, scales = data[:, back], scales[:, back]
    return PackedWeights(data, scales)


def stack(parts: Sequence[PackedWeights]) -> PackedWeights:
    """Stack the rows of matrices with the same input, in the most bits of any."""
    if len({part.bits for part in parts}) > 1:
        parts = [widen(part) for part in parts]
    return PackedWeights(np.concatenate([p.data for p in parts]), np.concatenate([p.scales for p in parts]))


def _split_scale(blocks: npt.NDArray[np.uint8]) -> tuple[Floats, npt.NDArray[np.uint8]]:
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    return scales, np.ascontiguousarray(blocks[..., 2:])


def _gguf_nibbles(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.concatenate([levels & np.uint8(15), levels >> np.uint8(4)], axis=-1)


def _join_nibbles(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return levels[..., 0::2] | (levels[..., 1::2] << np.uint8(4))
