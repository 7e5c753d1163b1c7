"""Strict reader of ONNX graphs: inputs, outputs, initializers and external files.

onnxruntime opens any file that a graph names, and takes some locations as memory addresses, so this module refuses such
graphs first. Reading needs only the standard library; weights are skipped, not copied.
"""

from __future__ import annotations

import math
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .onnx_wire import Message, decode

_TYPE_BITS = {
    **dict.fromkeys((22, 21, 23), 4),
    **dict.fromkeys((25, 26), 2),
    **dict.fromkeys((27, 28), 6),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
}
"""Bits per value by number in TensorProto.DataType; strings are not listed."""

_EXTERNAL = 1
_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")
_MAX_DIMENSIONS = 64
_MOST_INPUTS = {"GroupQueryAttention": 9}
"""Positions of another shape, for instance, end the process in onnxruntime."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Value:
    """A graph's input, output or initializer: ONNX type number and shape.

    A symbolic dimension is its symbol, an unknown one is "". A value without a type has `elem_type` 0 and
    shape ().
    """

    name: str
    elem_type: int
    shape: tuple[int | str, ...]

    @property
    def size(self) -> int:
        """The number of values of an initializer."""
        return math.prod(map(int, self.shape))

    @property
    def nbytes(self) -> int:
        """The bytes of an initializer that is not text."""
        return -(-self.size * _TYPE_BITS.get(self.elem_type, 0) // 8)


@dataclass(frozen=True)
class OnnxHeader:
    """Everything in an ONNX file except its weights.

    `external_files` are relative to the model's folder. `ops` are its operators, such as `MatMul` and
    `com.microsoft::MatMulNBits`.
    """

    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    initializers: Mapping[str, Value]
    external_files: tuple[str, ...]
    metadata: Mapping[str, str]
    ops: frozenset[str]


def read_onnx(path: Path) -> OnnxHeader:
    """Read an ONNX model; check its structure, and that all tensors are inside the files that it names.

    Raises NotFoundError when there is no such file, and VerificationError for a truncated or malformed file, duplicate
    names, parts that no exporter writes, and external data that is missing, too short or outside the model's folder.
    """
    return _Header(decode(path), path).header()


class _Header:
    """Checks a decoded model: unique names, known types, tensors that are inside their files."""

    def __init__(self, model: Message, path: Path) -> None:
        self._model = model
        self._path = path
        self._folder = path.parent.resolve()
        self._sizes: dict[str, int] = {}
        self._ops: set[str] = set()

    def header(self) -> OnnxHeader:
        model, graph = self._model, self._model.get("graph")
        if model.get("ir_version", 0) < 1 or graph is None or "opset_import" not in model:
            raise self._damaged("has no version, no graph or no opset")
        self._unique("operator set", ((_domain(entry), None) for entry in model["opset_import"]))
        metadata = [(e.get("key", ""), e.get("value", "")) for e in model.get("metadata_props", ())]
        for tensor in graph.get("initializer", ()):
            self._check_tensor(tensor)
        self._check_nodes(graph.get("node", ()))
        return OnnxHeader(
            self._by_name("input", map(self._value, graph.get("input", ()))),
            self._by_name("output", map(self._value, graph.get("output", ()))),
            self._by_name("initializer", _initializers(graph)),
            tuple(sorted({str(PurePosixPath(location)) for location in self._sizes})),
            self._unique("metadata key", metadata),
            frozenset(self._ops),
        )

    def _check_nodes(self, nodes: Sequence[Message]) -> None:
        for node in nodes:
            op_type, domain = node.get("op_type", ""), _domain(node)
            if not op_type:
                raise self._damaged(f"has node {node.get('name', '')[:80]!r} without an operator")
            if any(node.get("input", ())[_MOST_INPUTS.get(op_type, sys.maxsize) :]):
                raise self._damaged(f"has {op_type} with inputs that no exporter writes")
            self._ops.add(f"{domain}::{op_type}" if domain else op_type)
            for attribute in node.get("attribute", ()):
                if "t" in attribute:
                    self._check_tensor(attribute["t"])
                if attribute.get("name") == "num_outputs" and attribute.get("i") != len(node.get("output", ())):
                    # onnxruntime ends the process.
                    raise self._damaged(f"has {op_type[:80]} with another number of outputs than its num_outputs")

    def _check_tensor(self, tensor: Message) -> None:
        shape, bits = tensor.get("dims", ()), _TYPE_BITS.get(tensor.get("data_type", 0))
        called = f"tensor {tensor.get('name', '')[:80]!r}"
        if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
            raise self._damaged(f"has {called} of invalid shape {tuple(shape[:8])} with {len(shape)} dimensions")
        elements = math.prod(shape)
        nbytes = None if bits is None else -(-elements * bits // 8)
        location = tensor.get("data_location", 0)
        if location not in (0, _EXTERNAL):
            raise self._damaged(f"has {called} with the unknown data location {location}")
        external = tensor.get("external_data", ())
        stored = [key for key in ("raw_data", "data") if key in tensor]
        if location == _EXTERNAL or external:
            if location != _EXTERNAL or stored or nbytes is None:
                raise self._damaged(f"has {called} with internal and external data, or external data of unknown type")
            self._check_external(external, nbytes, called)
        elif len(stored) > 1 or ("raw_data" in stored and tensor["raw_data"] != nbytes):
            raise self._damaged(f"has {called} with more or fewer bytes than its type and shape need")
        elif elements and not stored:
            raise self._damaged(f"has {called} of shape {tuple(shape)} without values")

    def _check_external(self, entries: Sequence[Message], nbytes: int, called: str) -> None:
        properties = self._unique(
            "external data", [(entry.get("key", ""), entry.get("value", "")) for entry in entries]
        )
        unknown = [key for key in properties if key not in _EXTERNAL_KEYS]
        offset, length = properties.get("offset", "0"), properties.get("length", str(nbytes))
        if unknown or not all(re.fullmatch("[0-9]{1,19}", number) for number in (offset, length)):
            raise self._damaged(f"has {called} with the invalid external data {unknown or (offset[:40], length[:40])}")
        if int(length) != nbytes:
            raise self._damaged(f"has {called} with {length} bytes instead of {nbytes}")
        location = properties.get("location", "")
        if location not in self._sizes:
            self._sizes[location] = self._size_of(location)
        if int(offset) + nbytes > self._sizes[location]:
            raise self._damaged(f"has {called} past the end of {location[:80]!r}")

    def _size_of(self, location: str) -> int:
        """The size of the external file, which must be a file in the model's folder."""
        # onnxruntime takes the location */_ORT_MEM_ADDR_/* as its own memory, and the offset as an address in it.
        if not location or location.startswith("/") or ".." in location.split("/") or re.search(r"[\\:*\0]", location):
            raise self._damaged(f"has tensors in {location[:80]!r}, which is not a plain path in its folder")
        try:
            file = (self._folder / location).resolve(strict=True)
            status = file.stat()
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError up to Python 3.12
            raise self._damaged(f"needs the file {location[:80]!r}, which is missing or unreadable") from error
        if not file.is_relative_to(self._folder) or not stat.S_ISREG(status.st_mode):
            raise self._damaged(f"has tensors in {location[:80]!r}, which is outside its folder or not a regular file")
        return status.st_size

    def _value(self, info: Message) -> Value:
        tensor = info.get("type", {}).get("tensor_type", {})
        dimensions = tensor.get("shape", {}).get("dim", ())
        if any(len(dimension) > 1 for dimension in dimensions):
            raise self._damaged(f"has {info.get('name', '')[:80]!r} with a dimension that is both number and symbol")
        shape = tuple(_dimension(dimension) for dimension in dimensions)
        return Value(info.get("name", ""), tensor.get("elem_type", 0), shape)

    def _by_name(self, kind: str, values: Iterator[Value]) -> dict[str, Value]:
        return self._unique(kind, ((value.name, value) for value in values))

    def _unique(self, kind: str, pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
        table: dict[str, _T] = {}
        for name, value in pairs:
            if name in table:
                raise self._damaged(f"has the {kind} {name[:80]!r} twice")
            table[name] = value
        return table

    def _damaged(self, problem: str) -> VerificationError:
        return VerificationError(f"{self._path} {problem}", COPY_FILE_AGAIN)


def _domain(message: Message) -> str:
    domain: str = message.get("domain", "")
    return "" if domain == "ai.onnx" else domain


def _dimension(dimension: Message) -> int | str:
    number = dimension.get("dim_value", -1)
    # Some exporters write -1 for an unknown dimension.
    return int(number) if number >= 0 else str(dimension.get("dim_param", ""))


def _initializers(graph: Message) -> Iterator[Value]:
    for tensor in graph.get("initializer", ()):
        yield Value(tensor.get("name", ""), tensor.get("data_type", 0), tuple(tensor.get("dims", ())))
