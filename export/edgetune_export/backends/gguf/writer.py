"""Opens a GGUF adapter file for writing, with the keys that low-rank and prefix files share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import gguf
from edgetune_runtime.formats import BASE_FINGERPRINT
from edgetune_runtime.formats.atomic import replacing
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune_export.adapters.shapes import Adapter


@contextmanager
def adapter_file(
    adapter: Adapter, header: GgufHeader, out: Path, *, kind: str, base_fingerprint: str, alpha: float | None = None
) -> Iterator[gguf.GGUFWriter]:
    """A writer for the adapter, which writes its keys and tensors to `out` at the end, completely or not at all.

    `header` is the base's; `kind` is llama.cpp's `adapter.type`. Raises OutOfSpaceError if the disk is full.
    """
    with replacing(out) as temporary, closing(gguf.GGUFWriter(temporary, header.architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, kind)
        if alpha is not None:
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string(BASE_FINGERPRINT, base_fingerprint)
        writer.add_string("edgetune.method", adapter.method)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
