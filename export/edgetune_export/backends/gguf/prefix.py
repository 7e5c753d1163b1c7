"""Writes a prefix as a GGUF file of keys and values, which edgetune's runtime loads into llama.cpp's KV cache.

Each layer has `blk.N.prefix_k` and `blk.N.prefix_v`, [tokens, key/value heads, head size], in the layout of the cache:
keys in the same order as the rows of k in the base's file (see architectures/layout.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_adapter import CacheShape, cache_shape, prefix_tensor
from edgetune_runtime.formats.gguf_file import read_header

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Floats, Prefix
from edgetune_export.backends.base import DTYPES, check_f16_range

from .writer import adapter_file


def write_prefix(prefix: Prefix, base: Path, out: Path, *, dtype: str, base_fingerprint: str) -> None:
    """Write the prefix for the base GGUF `base`, whose sha256 is `base_fingerprint`; `dtype` is f32 or f16.

    Raises IncompatibleError if the prefix does not fit the base, VerificationError if a value is out of the range of
    f16, OutOfSpaceError if the disk is full.
    """
    header = read_header(base)
    check_prefix_fits(prefix, cache_shape(header))
    keys = _interleaved(prefix.keys) if architectures.of(header).interleaves_rows else prefix.keys
    with adapter_file(prefix, header, out, kind=prefix.shape, base_fingerprint=base_fingerprint) as writer:
        for layer in range(len(keys)):
            for which, heads in (("k", keys[layer]), ("v", prefix.values[layer])):
                rows = np.ascontiguousarray(heads.swapaxes(0, 1), DTYPES[dtype])
                writer.add_tensor(prefix_tensor(layer, which), rows)


def check_prefix_fits(prefix: Prefix, shape: CacheShape) -> None:
    """IncompatibleError if the base's keys and values have another shape, VerificationError if any overflows f16."""
    for part, array, size in (("keys", prefix.keys, shape.key_size), ("values", prefix.values, shape.value_size)):
        needed = (shape.layers, shape.heads, prefix.tokens, size)
        if array.shape != needed or not prefix.tokens:
            message = f"prefix {prefix.name!r} has {part} of shape {array.shape}, but the base needs {needed}"
            raise IncompatibleError(message, "use the base that the prefix was trained on")
        # Whatever the file has, the KV cache is in f16.
        check_f16_range(f"prefix {prefix.name!r} in its {part}", array, "train it again with a lower learning rate")


def _interleaved(keys: Floats) -> Floats:
    """The keys with the two halves of each head interleaved."""
    *outer, size = keys.shape
    return keys.reshape(*outer, 2, size // 2).swapaxes(-1, -2).reshape(keys.shape)
