"""Changed metadata and tensors in, GGUF files out: bases that no converter writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header

Fields = dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
"""Values by key, with the type of the value and of an array's items."""
UINT32, FLOAT32, STRING, BOOL, ARRAY, INT32 = (
    getattr(gguf.GGUFValueType, name) for name in ("UINT32", "FLOAT32", "STRING", "BOOL", "ARRAY", "INT32")
)


def rewritten(
    base: Path,
    out: Path,
    change: Callable[[Fields], object] = lambda fields: None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A copy of `base` with fields changed by `change`, and `tensors` replaced, added or (None) removed."""
    reader = gguf.GGUFReader(base)
    fields: Fields = {
        name: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    change(fields)
    writer = gguf.GGUFWriter(out, fields.pop("general.architecture")[0])
    for key, (value, kind, items) in fields.items():
        writer.add_key_value(key, value, kind, items)
    arrays = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name, array in (tensors or {}).items():
        arrays.pop(name, None)
        if array is not None:
            arrays[name] = (array, None)
    for name, (array, raw) in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def with_first_tokens(base: Path, out: Path, count: int) -> Path:
    """A copy of an f16 base with byte-level BPE that has only the first tokens, and the merges that make them."""
    header = read_header(base)
    whole = len(header.metadata["tokenizer.ggml.tokens"])
    rows = {
        tensor.name: np.fromfile(base, np.float16, count * tensor.shape[0], offset=tensor.offset).reshape(count, -1)
        for tensor in header.tensors.values()
        if tensor.shape[1:] == (whole,)
    }

    def cut(fields: Fields) -> None:
        for key, (value, kind, items) in fields.items():
            if isinstance(value, list) and len(value) == whole:
                fields[key] = value[:count], kind, items
            elif key.endswith(".vocab_size"):
                fields[key] = count, kind, items
        known = set(fields["tokenizer.ggml.tokens"][0])
        merges, kind, items = fields["tokenizer.ggml.merges"]
        possible = [merge for merge in merges if known.issuperset([*merge.split(" "), merge.replace(" ", "")])]
        fields["tokenizer.ggml.merges"] = possible, kind, items

    return rewritten(base, out, cut, rows)


def setting(key: str, value: object, kind: gguf.GGUFValueType) -> Callable[[Fields], object]:
    """A change that sets one value."""
    return lambda fields: fields.update({key: (value, kind, None)})


def changed(header: GgufHeader, key: str, value: object) -> GgufHeader:
    """The header with another value in its metadata."""
    return replace(header, metadata={**header.metadata, key: value})
