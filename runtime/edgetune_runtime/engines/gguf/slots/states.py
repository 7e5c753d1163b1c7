"""Rewrites which slot a saved state is in, so that a state belongs to its adapters and not to a slot's number.

The last layer of the KV cache is a head that only finds the slot: its key is a gain with the sign of whether the token
chooses a slot, its value the slot's number, both in the first dimension. The layout of states is that of `state.py`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .model import GAIN

_CELLS = 16
"""Where the table of cells begins."""
_BLOCK, _BLOCK_BYTES, _HIGHEST = 32, 34, 127
"""Of q8_0."""
_ROTATED = 64
"""llama.cpp rotates quantized values in groups of so many, in heads whose size is a multiple of it."""


class _Router(NamedTuple):
    """Views of a state: each cell's position and sequence, and the last layer's keys and values as bytes.

    Keys are [cells, bytes], and so are quantized values; other values are [head size, bytes].
    """

    cells: NDArray[np.int32]
    keys: NDArray[np.uint8]
    values: NDArray[np.uint8]
    is_transposed: bool


def in_slot(state: bytes | bytearray | memoryview, slot: int) -> bytearray:
    """A copy of a state that `check_state` accepts, which goes on with the adapter in `slot`, as one of sequence 0.

    The keys and values of its tokens stay those of the adapter that they were computed with. With slot 0, the state of
    the same tokens and adapter is the same whatever slot and sequence it was in.
    """
    copy = bytearray(state)
    struct.pack_into("<i", copy, 4, 0)
    router = _router(copy)
    router.cells[:, 2] = 0
    chooses = (router.cells[:, 0] == router.cells[:, 0].min()) & (slot > 0)
    if router.is_transposed:
        router.keys.view("<f2")[:, 0] = np.where(chooses, GAIN, -GAIN)
        router.values.view("<f2")[0] = np.where(chooses, slot, 0)
    else:
        _choose_quantized(router, chooses, slot)
    return copy


def _router(state: bytearray) -> _Router:
    (count,) = struct.unpack_from("<I", state, 12)
    cells = np.frombuffer(state, np.int32, 3 * count, _CELLS).reshape(count, 3)
    offset = _CELLS + cells.nbytes
    transposed, layers = struct.unpack_from("<II", state, offset)
    offset += 8
    for _ in range(layers):
        _, size = struct.unpack_from("<iQ", state, offset)
        start = offset + 12
        offset = start + size * count
    keys = np.frombuffer(state, np.uint8, size * count, start).reshape(count, size)
    # Keys and values of this head have the same size, and it is the last layer.
    values = np.frombuffer(state, np.uint8, size * count, len(state) - size * count)
    return _Router(cells, keys, values.reshape((-1, 2 * count) if transposed else (count, -1)), bool(transposed))


def _choose_quantized(router: _Router, chooses: NDArray[np.bool_], slot: int) -> None:
    """Write the keys and values of q8_0."""
    keys, values = (rows.reshape(len(rows), -1, _BLOCK_BYTES) for rows in (router.keys, router.values))
    numbers = keys[:, :, 2:].view(np.int8)
    is_rotated = bool(numbers[0, 0, 1])
    # A key that chooses is the negative of all others, whose first number is negative.
    flips = chooses != (numbers[:, 0, 0] > 0)
    numbers[flips] *= -1
    values[...] = 0
    # The rotation spreads one number evenly over a group.
    group = values[chooses, : _ROTATED // _BLOCK if is_rotated else 1]
    step = np.array([slot / (_ROTATED**0.5 if is_rotated else 1) / _HIGHEST], "<f2")
    group[:, :, :2] = step.view(np.uint8)
    group[:, :, 2 : None if is_rotated else 3] = _HIGHEST
    values[chooses, : group.shape[1]] = group
