"""Requantizes the base for merged models, so that it has enough bits to keep the trained change."""

from __future__ import annotations

from dataclasses import replace

from edgetune_runtime.formats.quantization import quantization_of_merged

from edgetune_export.backends.base import Source
from edgetune_export.base_file.quantize import quantize_gguf


def source_of_merged(source: Source, requested: str | None, *, trains_on_grid: bool = False) -> Source:
    """The base for merged models, quantized to what `quantization_of_merged` chooses.

    Writes a file to the source's work folder if the base has another quantization. Raises what `quantize_gguf` raises.
    """
    layer_types = source.header.layer_types
    quantization = quantization_of_merged(layer_types, requested, trains_on_grid=trains_on_grid)
    if quantization is None or quantization == source.quantization:
        return source
    # llama.cpp leaves some matrices in f32.
    if {quantization} <= {*layer_types} <= {quantization, "f32"}:
        return source
    path = source.work / f"merged-{source.fingerprint[:12]}-{quantization}.gguf"
    if not path.exists():
        quantize_gguf(source.path, path, quantization, again=True)
    return replace(source, path=path, quantization=quantization)
