"""Strict reader of GGUF headers: metadata and tensor table.

llama.cpp aborts the process, or worse, on some malformed files, so this module refuses them first. Standard library
only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .quantization import TYPES_BY_NUMBER, TensorType, main_type
from .regular_file import reading

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 63
PER_LAYER_EMBEDDING = "per_layer_token_embd.weight"
"""The tensor with an input of each layer for each token (Gemma 4), often most of the file. llama.cpp reads the rows of
the tokens that occur, and leaves the tensor in the mapped file."""


@dataclass(frozen=True)
class TensorInfo:
    """An entry of the tensor table: `shape` in ggml order (columns first), `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int

    @property
    def type(self) -> TensorType:
        """How its values are stored."""
        return TYPES_BY_NUMBER[self.ggml_type]


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF file before its weights. Arrays are tuples; `value_types` has each key's type number."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    value_types: Mapping[str, int] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as `llama`; VerificationError when it is missing."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise VerificationError("the GGUF file has no general.architecture", COPY_FILE_AGAIN)
        return name

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def values_by_type(self) -> dict[str, int]:
        """The number of values in each tensor type."""
        return _values_by_type(self.tensors.values())

    @property
    def main_type(self) -> TensorType:
        """The tensor type with the most bytes among `layer_matrices`, or among all tensors where there are none."""
        return main_type(_values_by_type(self.layer_matrices or self.tensors.values()))

    @property
    def layer_matrices(self) -> list[TensorInfo]:
        """The matrices, but for the embeddings and the output layer."""
        others = {"token_embd.weight", "output.weight", PER_LAYER_EMBEDDING}
        return [item for name, item in self.tensors.items() if len(item.shape) > 1 and name not in others]

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The tensor types of `layer_matrices`, sorted."""
        return tuple(sorted({tensor.type.name for tensor in self.layer_matrices}))

    @property
    def output_tensor(self) -> str:
        """The name of the output layer's matrix, which is the token embedding if they are tied."""
        return "output.weight" if "output.weight" in self.tensors else "token_embd.weight"

    @property
    def output_share(self) -> float:
        """The share of the output matrix in the values that a decode step reads; 0 without a vocabulary."""
        counts = {name: math.prod(tensor.shape) for name, tensor in self.tensors.items() if name != PER_LAYER_EMBEDDING}
        embedding = counts.get("token_embd.weight", 0)
        # Without an output matrix of its own, a base uses its embedding, of which a step reads one row otherwise.
        read = sum(counts.values()) - (embedding if "output.weight" in counts else 0)
        return counts.get("output.weight", embedding) / max(read, 1)


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF file's metadata and tensor table, and check that all tensors are inside the file.

    Raises NotFoundError when there is no such file, IncompatibleError for a part of a split file, and
    VerificationError for a wrong magic, a truncated file, duplicate names, unknown types, invalid sizes, or tensors
    that overlap or extend past the end.
    """
    with reading(path) as file:
        return _Reader(file, path).header()


def digest_of_tokenizer(header: GgufHeader) -> str:
    """Hex sha256 of all `tokenizer.*` values except chat templates: equal digests mean equal tokenizers."""
    values = {k: v for k, v in header.metadata.items() if k.startswith("tokenizer.") and "chat_template" not in k}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_of_chat_template(header: GgufHeader) -> str:
    """Hex sha256 of the default chat template, or of the empty string when the file has none."""
    template = str(header.metadata.get("tokenizer.chat_template", ""))
    return hashlib.sha256(template.encode("utf-8", "surrogateescape")).hexdigest()


def _values_by_type(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    values: Counter[str] = Counter()
    for tensor in tensors:
        values[tensor.type.name] += math.prod(tensor.shape)
    return dict(values)


def _join_heads(metadata: dict[str, Any], value_types: dict[str, int]) -> None:
    """Replace a number of heads for each layer by one number, if it is the same in all layers.

    llama.cpp's converter writes one for each layer of a Granite 4, dense or not.
    """
    own = metadata.get("general.architecture")
    key = f"{own}.attention.head_count_kv"
    heads = metadata.get(key)
    if isinstance(heads, tuple) and len(set(heads)) == 1 and len(heads) == metadata.get(f"{own}.block_count"):
        metadata[key], value_types[key] = heads[0], _UINT32


class _Reader:
    """Reads one header; each size is compared with the rest of the file before anything is allocated."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise self._damaged("does not start with the magic GGUF")
        version = self._unsigned(4)
        if version not in _VERSIONS:
            raise self._damaged(f"has GGUF version {version}, not one of {_VERSIONS}")
        tensor_count, key_count = self._unsigned(8), self._unsigned(8)
        metadata: dict[str, Any] = {}
        value_types: dict[str, int] = {}
        for _ in range(key_count):
            key = self._string()
            # llama.cpp reads a key up to a NUL, and so another one than what is checked here.
            if not key or "\0" in key or key in metadata:
                raise self._damaged(f"has the key {key[:80]!r}, which is empty, invalid or repeated")
            value_types[key] = self._unsigned(4)
            metadata[key] = self._value(value_types[key])
        alignment = metadata.get("general.alignment", 32)
        if value_types.get("general.alignment", _UINT32) != _UINT32 or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"has alignment {alignment!r}, which is not a power of two")
        self._refuse_split(metadata)
        _join_heads(metadata, value_types)
        return GgufHeader(metadata, self._tensors(tensor_count, alignment), value_types)

    def _refuse_split(self, metadata: Mapping[str, Any]) -> None:
        """Refuse a part of a split file: llama.cpp would load the other parts, which no digest covers."""
        # llama-gguf-split leaves a count of 0 in the files that it merges.
        is_part = any(key.startswith("split.") for key in metadata)
        parts = metadata.get("split.count", "several" if is_part else 0)
        if parts != 0:
            message = f"{self._path} is one of {str(parts)[:80]} parts of a split GGUF file"
            raise IncompatibleError(message, "merge the parts with llama-gguf-split --merge")

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string()
            size = len(name.encode("utf-8", "surrogateescape"))
            if name in places or not 1 <= size <= _MAX_NAME_BYTES or "\0" in name:
                raise self._damaged(f"has the tensor name {name[:80]!r}, which is empty, too long, invalid or repeated")
            dimensions = self._unsigned(4)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._damaged(f"has tensor {name!r} with {dimensions} dimensions")
            shape = tuple(self._unsigned(8) for _ in range(dimensions))
            places[name] = (shape, self._unsigned(4), self._unsigned(8))
        start = self._position + -self._position % alignment
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for name, (shape, kind, offset) in places.items():
            nbytes = self._tensor_bytes(name, shape, kind)
            # llama.cpp accepts only contiguous tensors, so a gap or an overlap means damage.
            if offset != expected:
                raise self._damaged(f"has tensor {name!r} at offset {offset} instead of {expected}")
            if start + offset + nbytes > self._size:
                raise self._damaged(f"is truncated: it ends within tensor {name!r}")
            tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)
            expected = offset + nbytes + -nbytes % alignment
        return tensors

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind not in TYPES_BY_NUMBER:
            raise self._damaged(f"has tensor {name!r} of the unknown type {kind}")
        tensor_type = TYPES_BY_NUMBER[kind]
        if min(shape) == 0 or shape[0] % tensor_type.block:
            raise self._damaged(f"has tensor {name!r} of shape {shape}, which is invalid for {tensor_type.name}")
        return math.prod(shape) // tensor_type.block * tensor_type.block_bytes

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return struct.unpack(code, self._take(struct.calcsize(code)))[0]
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        raise self._damaged(f"has a value of unknown type {kind}")

    def _array(self) -> tuple[Any, ...]:
        kind, count = self._unsigned(4), self._unsigned(8)
        if kind == _STRING:
            self._need(count * 8)
            return tuple(self._strings(count))
        if kind not in _SCALARS:
            raise self._damaged(f"has an array of unknown type {kind}")
        code = _SCALARS[kind]
        data = self._take(count * struct.calcsize(code))
        return struct.unpack(f"<{count}{code[1]}", data)

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _string(self) -> str:
        return self._take(self._unsigned(8)).decode("utf-8", "surrogateescape")

    def _strings(self, count: int) -> Iterator[str]:
        """So many strings, as `_string` reads them but in half the time: a vocabulary has 100,000 and more."""
        read, left = self._file.read, self._size - self._position
        for _ in range(count):
            prefix = read(8)
            size = int.from_bytes(prefix, "little")
            left -= 8 + size
            if left < 0 or len(prefix) != 8 or len(data := read(size)) != size:
                raise self._damaged("is truncated: it ends within its header")
            yield data.decode("utf-8", "surrogateescape")
        self._position = self._size - left

    def _take(self, count: int) -> bytes:
        self._need(count)
        data = self._file.read(count)
        if len(data) != count:
            raise self._damaged("is truncated: it ends within its header")
        self._position += count
        return data

    def _need(self, count: int) -> None:
        if count > self._size - self._position:
            raise self._damaged("is truncated: it ends within its header")

    def _damaged(self, problem: str) -> VerificationError:
        return VerificationError(f"{self._path} {problem}", COPY_FILE_AGAIN)
