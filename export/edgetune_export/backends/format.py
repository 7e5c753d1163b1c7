"""What is known of a format before any of its libraries is imported: recipes and predictions of size need no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune_runtime.bundle import GENERATION
from edgetune_runtime.formats.quantization import TENSOR_TYPES

_FLOAT = 4


@dataclass(frozen=True)
class Format:
    """A format's facts.

    `adapter_dtypes` are the number formats of an adapter's file, the default first, and `dtype_key` is the recipe's key
    for it; `tasks` maps what its models are for to the module that writes them. `links_base` says
    that the base ships as the GGUF file that it is; `base_factor` and `adapter_factor` are the sizes of its files
    against those of GGUF with the same numbers, and `process_mb` (10^6 bytes) is what a process that writes it takes
    beyond the base in float32.
    """

    adapter_dtypes: tuple[str, ...] = ("f16", "q8_0", "f32")
    dtype_key: str = "dtype"
    tasks: Mapping[str, str] = field(default_factory=lambda: {GENERATION: "backend"})
    links_base: bool = False
    base_factor: float = 1.0
    adapter_factor: float = 1.0
    process_mb: float = 700.0

    def base_bytes(self, gguf_bytes: float, parameters: int, weights: str) -> float:
        """About the bytes of a base whose GGUF file has `gguf_bytes`; `weights` are those of `OnnxOptions.weights`."""
        return parameters * _FLOAT if self._is_float(weights) else gguf_bytes * self.base_factor

    def merged_bytes(self, parameters: int, weights: str) -> float:
        """About the bytes of a merged model, whose weights are rounded to 8 bits."""
        return parameters * (_FLOAT if self._is_float(weights) else TENSOR_TYPES["q8_0"].bytes_per_value)

    def adapter_bytes(self, parameters: int, dtype: str) -> float:
        """About the bytes of an adapter of low rank."""
        return parameters * TENSOR_TYPES[dtype].bytes_per_value * self.adapter_factor

    def export_mb(self, weights_mb: float, weights: str) -> float:
        """About the memory that writing a base takes whose float32 weights are `weights_mb` (10^6 bytes)."""
        # A graph in float32 is a copy of the base.
        return self.process_mb + (2 if self._is_float(weights) else 1) * weights_mb

    def _is_float(self, weights: str) -> bool:
        return weights == "fp32" and not self.links_base
