"""Facts of a format that recipes and size predictions need, without importing its libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.formats.quantization import TENSOR_TYPES
from pydantic import BaseModel, ConfigDict

from edgetune_export.architectures.shape import BaseShape, SizedModule

IMPORTS_MB = 450.0
"""Resident memory (10^6 bytes) of Python with torch for CPUs, transformers, PEFT and accelerate: measured on x86-64
Linux."""
PROCESS_MB = 700.0
"""The same with the engines, without weights: measured with builds of 135M and 506M parameters."""
_FLOAT = 4


class FormatOptions(BaseModel):
    """Base class of a format's options, which are a section of the recipe; the text under a field describes its key."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


OptionsByFormat = Mapping[str, FormatOptions]
"""The options of the formats that have any, by their names."""


@dataclass(frozen=True)
class Format:
    """A format's facts.

    `adapter_dtypes` are the number formats of an adapter's file, the default first, and `dtype_key` is the recipe's key
    for it. Those in `low_rank_dtypes` are for low-rank adapters only. `tasks` maps tasks to the module that writes
    their models. With `links_base` the base's GGUF file ships unchanged. `requantized_kl` has the types that the format
    may requantize a base to after training, with the largest accepted mean KL.
    """

    adapter_dtypes: tuple[str, ...] = ("f32", "f16")
    dtype_key: str = "dtype"
    low_rank_dtypes: tuple[str, ...] = ()
    tasks: Mapping[str, str] = field(default_factory=lambda: {GENERATION: "backend"})
    links_base: bool = False
    requantized_kl: Mapping[str, float] = field(default_factory=dict)

    def writes_floats(self, options: OptionsByFormat) -> bool:
        """Whether the options ask for weights in float32, whatever the base's GGUF file has."""
        return False

    def base_bytes(self, own_bytes: float, parameters: int, options: OptionsByFormat) -> float:
        """Approximate size of a base that has `own_bytes` bytes in this format with the types of its GGUF file."""
        # An embedding of floats is in an ONNX file a second time if it is the output layer too.
        return max(parameters * _FLOAT, own_bytes) if self.writes_floats(options) else own_bytes

    def low_rank_bytes(self, base: BaseShape, ranks: Iterable[tuple[SizedModule, int]], dtype: str) -> float:
        """Approximate size in bytes of a low-rank adapter for `base`, with the `ranks` of its modules."""
        values = sum(rank * module.values_per_rank for module, rank in ranks)
        return self.adapter_bytes(values, dtype)

    def adapter_bytes(self, values: int, dtype: str) -> float:
        """Size in bytes of so many numbers of an adapter of another shape."""
        return values * TENSOR_TYPES[dtype].bytes_per_value

    def export_mb(self, own_bytes: float, parameters: int, options: OptionsByFormat) -> float:
        """Approximate memory in MB of exporting and checking a base, without its weights in float32; see `base_bytes`.

        The engine of the check has the file in memory and a copy of it, repacked for the processor.
        """
        return PROCESS_MB + 2 * self.base_bytes(own_bytes, parameters, options) / 1e6
