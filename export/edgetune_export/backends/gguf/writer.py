"""Opens a GGUF adapter file for writing, with the keys that low-rank and prefix files share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import gguf
from edgetune_runtime.formats.atomic import replacing

from edgetune_export.adapters.shapes import Adapter


@contextmanager
def adapter_file(adapter: Adapter, kind: str, architecture: str, out: Path) -> Iterator[gguf.GGUFWriter]:
    """A writer for the adapter, which writes its keys and tensors to `out` at the end, completely or not at all.

    `kind` is llama.cpp's `adapter.type`. Raises OutOfSpaceError if the disk is full.
    """
    with replacing(out) as temporary, closing(gguf.GGUFWriter(temporary, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, kind)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def add_origin(writer: gguf.GGUFWriter, adapter: Adapter, base_fingerprint: str) -> None:
    """Add the base that the adapter was trained on, and its method."""
    writer.add_string("edgetune.base_fingerprint", base_fingerprint)
    writer.add_string("edgetune.method", adapter.method)
