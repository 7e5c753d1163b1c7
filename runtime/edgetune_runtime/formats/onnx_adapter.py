"""Strict reader of `.onnx_adapter` files; the tensors are views of the mapped file, not copies.

A FlatBuffers file with onnxruntime's schema (`onnxruntime/lora/adapter_format/adapter_schema.fbs`). onnxruntime's own
reader copies the file into memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import VerificationError, importing
from edgetune_runtime.wording import ONNX_NEEDS

with importing(*ONNX_NEEDS):
    from flatbuffers import encode, number_types, packer
    from flatbuffers.table import Table

_IDENTIFIER, _FORMAT_VERSION = b"TORT", 1
_TYPES = {1: np.float32, 10: np.float16}
"""The types that adapters have, by their numbers in the schema's TensorDataType."""
_MOST_AXES = 4
"""Those of keys and values. A file may claim millions, with a product that takes hours to compute."""
_LONGEST_NAME = 1000
"""Bytes of a tensor's name; overlapping ones could otherwise take the square of the file's size."""

_BAD = (OSError, struct.error, ValueError, TypeError, IndexError, OverflowError)
"""What a missing file, and an offset or a size outside the file, end in."""


def adapter_arrays(path: Path, name: str) -> tuple[dict[str, NDArray[np.generic]], int]:
    """The tensors of an adapter's file, as read-only views of the mapped file, and the version of its model.

    `name` is the adapter's name in errors. VerificationError for a file that is not as the schema has it.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        root = _table(mapped, 0)
        if mapped[4:8] != _IDENTIFIER or _number(root, 0) != _FORMAT_VERSION:
            raise ValueError(f"no format version {_FORMAT_VERSION}")
        start, count = _vector(root, 3, item_bytes=4)
        arrays: dict[str, NDArray[np.generic]] = {}
        for number in range(count):
            tensor, values = _parameter(_table(mapped, start + 4 * number))
            # At once: many items may point to the same tensor.
            if tensor in arrays:
                raise ValueError(f"two tensors {tensor[:80]!r}")
            arrays[tensor] = values
        return arrays, _number(root, 2)
    except _BAD as error:
        message = f"the file of adapter {name!r} is not an .onnx_adapter file: {error}"
        raise VerificationError(message, "build the bundle again") from error


def _parameter(table: Table) -> tuple[str, NDArray[np.generic]]:
    """The name and the values of a tensor."""
    start, size = _vector(table, 0, item_bytes=1)
    if size > _LONGEST_NAME:
        raise ValueError(f"a tensor's name has {size} bytes, more than {_LONGEST_NAME}")
    name = bytes(table.Bytes[start : start + size]).decode("utf-8")
    start, rank = _vector(table, 1, item_bytes=8)
    if rank > _MOST_AXES:
        raise ValueError(f"{name[:80]!r} has {rank} axes, more than {_MOST_AXES}")
    shape = [int(table.Get(number_types.Int64Flags, start + 8 * axis)) for axis in range(rank)]
    kind = _TYPES.get(_number(table, 2))
    if kind is None or min(shape, default=0) < 0:
        raise ValueError(f"{name[:80]!r} has the shape {shape} and type {_number(table, 2)}, not float32 or float16")
    start, size = _vector(table, 3, item_bytes=1)
    if math.prod(shape) * np.dtype(kind).itemsize != size:
        raise ValueError(f"{name[:80]!r} of shape {shape} has {size} bytes")
    return name, np.frombuffer(table.Bytes, kind, math.prod(shape), start).reshape(shape)


def _table(mapped: mmap.mmap, place: int) -> Table:
    """The table that an offset at `place` points to."""
    return Table(mapped, place + encode.Get(packer.uoffset, mapped, place))


def _field(table: Table, number: int) -> int:
    """The place of a field; 0 if the table does not have it."""
    offset = table.Offset(4 + 2 * number)
    return table.Pos + offset if offset else 0


def _number(table: Table, number: int) -> int:
    """A 32-bit field; its default is 0."""
    place = _field(table, number)
    return int(table.Get(number_types.Int32Flags, place)) if place else 0


def _vector(table: Table, number: int, *, item_bytes: int) -> tuple[int, int]:
    """Where a vector's items start, and their number; ValueError if they are not inside the file."""
    place = _field(table, number)
    if not place:
        return 0, 0
    vector = place + encode.Get(packer.uoffset, table.Bytes, place)
    count = encode.Get(packer.uoffset, table.Bytes, vector)
    if vector + 4 + count * item_bytes > len(table.Bytes):
        raise ValueError(f"{count} items at byte {vector}, beyond its end")
    return vector + 4, count
