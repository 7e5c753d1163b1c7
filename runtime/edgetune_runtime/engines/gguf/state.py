"""Convert a prefix file to a llama.cpp sequence state, and check saved states before llama.cpp reads them.

The layout is the one of `llama_kv_cache::state_write` at llama.cpp 0c1e57098: a magic number and the sequence, then for
each KV cache of the model (one, and a second one for sliding-window layers) the cells with their positions, the keys of
all its layers, and the values of all its layers. If some layers are recurrent, their states follow. llama.cpp itself
refuses other sizes and types than its own; the engine checks that llama.cpp returns the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.formats.gguf_adapter import CacheShape, cache_shape, check_prefix, prefix_tensor
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo
from edgetune_runtime.formats.gguf_sizes import recurrent_layers
from edgetune_runtime.wording import COPY_FILE_AGAIN

_MAGIC = 0xAF143CD8
_STREAMS = 1
_F16 = 1
_TRANSPOSED = 1

Halves = NDArray[np.float16]


@dataclass(frozen=True)
class PrefixState:
    """A prefix of `tokens` tokens, as the state of sequence 0."""

    tokens: int
    data: bytes


def read_prefix(path: Path, adapter: GgufHeader, base: GgufHeader, name: str) -> PrefixState:
    """Read the prefix in the file with the header `adapter`; `name` is the adapter's name in errors.

    Raises VerificationError for a damaged file and IncompatibleError for a prefix of another base.
    """
    tokens, shape = check_prefix(adapter, base, name), cache_shape(base)
    layers = range(shape.layers)
    keys, values = ([_rows(path, adapter.tensors[prefix_tensor(n, which)], name) for n in layers] for which in "kv")
    return PrefixState(tokens, _state(keys, values, shape))


def check_state(state: memoryview, context_length: int, header: GgufHeader) -> None:
    """Raise VerificationError unless the bytes are exactly a state of sequence 0 that fits in the context.

    llama.cpp compares types and sizes with its cache itself.
    """
    recurrent = len(recurrent_layers(header))
    # Of a rotary embedding of positions in space, a cell has three more numbers before its sequence.
    cell = 6 if f"{header.architecture}.rope.dimension_sections" in header.metadata else 3
    try:
        magic, sequence = struct.unpack_from("<Ii", state)
        offset = 8 if (magic, sequence) == (_MAGIC, 0) else len(state) + 1
        if recurrent:
            offset, last = _end_of_cache(state, offset, context_length, cell)
            offset = _end_of_recurrent(state, offset, last, recurrent)
        while offset < len(state):
            offset, _ = _end_of_cache(state, offset, context_length, cell)
    except (struct.error, ValueError):
        offset = -1
    if offset != len(state):
        raise VerificationError("a saved state does not have llama.cpp's layout", "start without it")


def _end_of_cache(state: memoryview, offset: int, context_length: int, cell: int) -> tuple[int, int]:
    """The end of the KV cache that starts at `offset`, and its last position; ValueError or struct.error if there is
    none."""
    streams, count = struct.unpack_from("<II", state, offset)
    if streams != _STREAMS or not 0 < count <= context_length:
        raise ValueError("cells")
    cells = np.frombuffer(state, "<i4", cell * count, offset + 8).reshape(count, cell)
    positions, sequences = cells[:, 0], cells[:, [1, -1]]
    if positions.min() < 0 or positions.max() >= context_length or (sequences != (1, 0)).any():
        raise ValueError("positions")
    offset += 8 + cells.nbytes
    transposed, layers = struct.unpack_from("<II", state, offset)
    offset += 8
    for values in (False, True):
        for _ in range(layers):
            if values and transposed:
                _, size, rows = struct.unpack_from("<iII", state, offset)
            else:
                _, size = struct.unpack_from("<iQ", state, offset)
                rows = 1
            offset += 12 + size * rows * count
            if offset > len(state):
                raise ValueError("layers")
    return offset, int(positions.max())


def _end_of_recurrent(state: memoryview, offset: int, last: int, layers: int) -> int:
    """The end of the recurrent states that start at `offset`: of one cell at position `last`, in each layer one of the
    convolution and one of the sums. Errors as in `_end_of_cache`."""
    count, position, sequences, transposed, _ = struct.unpack_from("<IiIII", state, offset)
    if (count, sequences, transposed) != (1, 0, 0) or position != last:
        raise ValueError("recurrent states")
    offset += 20
    for _ in range(2 * layers):
        _, size = struct.unpack_from("<iQ", state, offset)
        offset += 12 + size
        if offset > len(state):
            raise ValueError("layers")
    return offset


def _rows(path: Path, tensor: TensorInfo, name: str) -> Halves:
    """The values of a tensor, [tokens, heads * size]."""
    width = tensor.shape[0] * tensor.shape[1]
    stored = "<f4" if tensor.type.name == "f32" else "<f2"
    raw = np.fromfile(path, stored, tensor.shape[2] * width, offset=tensor.offset)
    with np.errstate(over="ignore"):
        rows: Halves = raw.astype("<f2").reshape(-1, width)
    if not np.isfinite(rows).all():
        message = f"adapter {name!r} has values in {tensor.name!r} that are not finite in f16"
        raise VerificationError(message, COPY_FILE_AGAIN)
    return rows


def _state(keys: Sequence[Halves], values: Sequence[Halves], shape: CacheShape) -> bytes:
    whole = [layer for layer in range(shape.layers) if layer not in shape.sliding]
    tokens = len(keys[0])
    parts = [(whole, 0)]
    if shape.window:
        # llama.cpp saves no cells for tokens before the window.
        parts.append((list(shape.sliding), max(0, tokens - shape.window)))
    pieces = [struct.pack("<Ii", _MAGIC, 0)]
    for layers, first in parts:
        pieces.append(_cache([keys[n][first:] for n in layers], [values[n][first:] for n in layers], first, tokens))
    return b"".join(pieces)


def _cache(keys: Sequence[Halves], values: Sequence[Halves], first: int, end: int) -> bytes:
    """One KV cache: the cells of positions `first` to `end`, each used by sequence 0 only."""
    cells = np.zeros((end - first, 3), "<i4")
    cells[:, 0], cells[:, 1] = np.arange(first, end), 1
    pieces = [
        struct.pack("<II", _STREAMS, end - first),
        cells.tobytes(),
        struct.pack("<II", _TRANSPOSED, len(keys)),
    ]
    for rows in keys:
        pieces += [struct.pack("<iQ", _F16, rows.shape[1] * rows.itemsize), rows.tobytes()]
    for rows in values:
        pieces += [struct.pack("<iII", _F16, rows.itemsize, rows.shape[1]), rows.T.tobytes()]
    return b"".join(pieces)
