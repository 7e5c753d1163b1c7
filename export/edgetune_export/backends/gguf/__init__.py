"""Writes GGUF files for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable

from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune_export.architectures.shape import BaseShape, SizedModule
from edgetune_export.backends.format import Format

AUTO = "auto"
"""The number format of adapters that llama.cpp multiplies fastest."""
_BLOCK = TENSOR_TYPES["q8_0"].block
_LEAST_FILLED = 16
"""From this rank on, whole blocks of q8_0 take about as many bytes as f16 does without them."""


def stored_rank(rank: int, dtype: str) -> int:
    """The rank of a matrix in a file: under AUTO, larger ones are filled with zeros up to whole blocks of q8_0."""
    return -(-rank // _BLOCK) * _BLOCK if dtype == AUTO and rank >= _LEAST_FILLED else rank


def factor_types(dtype: str, rank: int, columns: int) -> tuple[str, str]:
    """The tensor types of A, which has so many columns, and of B, whose rows are as long as the stored rank.

    llama.cpp multiplies numbers in f16 one by one where a row has less than 32, and in some builds less than 64.
    """
    if dtype == AUTO and rank < _LEAST_FILLED:
        return "f16", "f32"
    if dtype in {AUTO, "q8_0"}:
        a_type, b_type = ("f16" if length % _BLOCK else "q8_0" for length in (columns, rank))
        return a_type, b_type
    return dtype, dtype


def prefix_type(dtype: str) -> str:
    """The tensor type of the numbers of an adapter without factors."""
    return "f16" if dtype == AUTO else dtype


class _Gguf(Format):
    def low_rank_bytes(self, base: BaseShape, ranks: Iterable[tuple[SizedModule, int]], dtype: str) -> float:
        """See `Format.low_rank_bytes`."""
        total = 0.0
        for module, own_rank in ranks:
            rank = stored_rank(own_rank, dtype)
            types = factor_types(dtype, rank, module.columns)
            a_type, b_type = (TENSOR_TYPES[name].bytes_per_value for name in types)
            total += rank * (module.columns * a_type + module.rows * b_type)
        return total

    def adapter_bytes(self, values: int, dtype: str) -> float:
        """See `Format.adapter_bytes`."""
        return super().adapter_bytes(values, prefix_type(dtype))


FORMAT = _Gguf(adapter_dtypes=(AUTO, "f16", "q8_0", "f32"), low_rank_dtypes=("q8_0",), links_base=True)
