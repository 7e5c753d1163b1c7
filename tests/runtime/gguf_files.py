"""Changed metadata and tensors in, GGUF files out: bases that no converter writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from edgetune_runtime.formats.gguf_file import GgufHeader
from fuzz.forms.gguf_file import read as parts_of
from fuzz.forms.gguf_file import written

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


def scaled(base: Path, out: Path, factors: np.ndarray | None = None) -> Path:
    """A copy of a base whose rotary embedding is scaled for longer contexts: linearly, or by a factor per frequency."""
    own = f"{gguf.GGUFReader(base).fields['general.architecture'].contents()}.rope.scaling"
    if factors is not None:
        return rewritten(base, out, tensors={"rope_freqs.weight": factors})
    entries: Fields = {f"{own}.type": ("linear", STRING, None), f"{own}.factor": (4.0, FLOAT32, None)}
    return rewritten(base, out, lambda fields: fields.update(entries))


def with_first_tokens(base: Path, out: Path, count: int) -> Path:
    """A copy of a base with only its first tokens, and the merges that make them; all, if it has no more."""
    file = parts_of(base.read_bytes())
    items = {item[0].removeprefix("tokenizer.ggml."): item for item in file.metadata}
    size = len(items["tokens"][2][1])
    if size <= count:
        return Path(shutil.copy(base, out))
    for key in ("tokens", "token_type"):
        kind, values = items[key][2]
        items[key][2] = [kind, values[:count]]
    known = set(items["tokens"][2][1])
    kind, merges = items["merges"][2]
    items["merges"][2] = [kind, [merge for merge in merges if known >= {*merge.split(" "), merge.replace(" ", "")}]]
    for item in file.metadata:
        if item[0].endswith(".vocab_size"):
            item[2] = count
    data, ends = list[bytes](), [*(offset for *_, offset in file.tensors[1:]), len(file.data)]
    for tensor, end in zip(file.tensors, ends, strict=True):
        part = file.data[tensor[3] : end]
        if tensor[1][-1] == size:
            part = part[: len(part) // size * count]
            tensor[1] = [*tensor[1][:-1], count]
        tensor[3] = sum(map(len, data))
        data.append(part)
    out.write_bytes(written(replace(file, data=b"".join(data), counts=[len(file.tensors), len(file.metadata)])))
    return out


def setting(key: str, value: object, kind: gguf.GGUFValueType) -> Callable[[Fields], object]:
    """A change that sets one value."""
    return lambda fields: fields.update({key: (value, kind, None)})


def changed(header: GgufHeader, key: str, value: object) -> GgufHeader:
    """The header with another value in its metadata."""
    return replace(header, metadata={**header.metadata, key: value})
