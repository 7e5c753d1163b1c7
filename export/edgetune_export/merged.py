"""Requantizes the base for merged models, so that it has enough bits to keep the trained change."""

from __future__ import annotations

from dataclasses import replace

from edgetune_devices.needs import scheme_of_merged
from edgetune_runtime.formats.gguf_file import describe_quantization, read_header

from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.quantize import quantize_gguf


def source_of_merged(source: Source, wanted: str | None = None) -> Source:
    """The base for merged models, quantized to `wanted` or to what `scheme_of_merged` chooses.

    Writes a file to the source's work folder if the base has another quantization. Raises what `quantize_gguf` raises.
    """
    current = describe_quantization(read_header(source.path))
    scheme = scheme_of_merged(current, wanted)
    if scheme is None or scheme == current:
        return source
    path = source.work / f"merged-{scheme}.gguf"
    if not path.exists():
        quantize_gguf(source.path, path, scheme, again=True)
    return replace(source, path=path)
