"""A base in, the base that merged models are copies of out: with bits enough for what was trained."""

from __future__ import annotations

from dataclasses import replace

from edgetune_devices.needs import scheme_of_merged
from edgetune_runtime.formats.gguf_file import describe_quantization, read_header

from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.quantize import quantize_gguf


def source_of_merged(source: Source, wanted: str | None = None) -> Source:
    """The base as `wanted`, or as `scheme_of_merged` has it, in a file of the source's folder where it is another one.

    Raises what `quantize_gguf` raises.
    """
    held = describe_quantization(read_header(source.path))
    scheme = scheme_of_merged(held, wanted)
    if scheme is None or scheme == held:
        return source
    path = source.work / f"merged-{scheme}.gguf"
    if not path.exists():
        quantize_gguf(source.path, path, scheme, again=True)
    return replace(source, path=path)
