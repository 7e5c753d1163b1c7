"""Importance matrices, and their files as llama.cpp's tools read them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from edgetune_runtime.formats.atomic import replacing

from edgetune_export.adapters.shapes import Floats

_TYPE = "imatrix"
# Tokens per chunk, of which a file has the number; llama-imatrix has one as long as its context.
_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Importance:
    """An importance matrix: for tensors by name, the mean square of each column's inputs over `tokens` tokens."""

    mean_squares: Mapping[str, Floats]
    tokens: int


def write_imatrix(importance: Importance, out: Path, dataset: str) -> None:
    """Write the file that `llama-quantize --imatrix` reads; `dataset` says where the tokens are from."""
    with replacing(out) as temporary, closing(gguf.GGUFWriter(temporary, _TYPE)) as writer:
        writer.add_type(_TYPE)
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", max(importance.tokens // _CHUNK_TOKENS, 1))
        writer.add_uint32("imatrix.chunk_size", _CHUNK_TOKENS)
        for name, values in sorted(importance.mean_squares.items()):
            writer.add_tensor(f"{name}.in_sum2", (values * importance.tokens).astype(np.float32)[None])
            writer.add_tensor(f"{name}.counts", np.full((1, 1), importance.tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
