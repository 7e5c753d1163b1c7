"""Strict decoder of protobuf's wire format for ONNX files.

Weights are skipped, not copied. Standard library only.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .regular_file import reading

_MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {
        1: ("ir_version", "int64"),
        7: ("graph", "Graph"),
        8: ("opset_import", "OperatorSet*"),
        14: ("metadata_props", "Entry*"),
        20: ("training_info", "refused"),
        25: ("functions", "refused"),
    },
    "OperatorSet": {1: ("domain", "text"), 2: ("version", "int64")},
    "Entry": {1: ("key", "text"), 2: ("value", "text")},
    "Graph": {
        1: ("node", "Node*"),
        2: ("name", "text"),
        5: ("initializer", "Tensor*"),
        11: ("input", "ValueInfo*"),
        12: ("output", "ValueInfo*"),
        13: ("value_info", "ValueInfo*"),
        15: ("sparse_initializer", "refused"),
    },
    "Node": {
        1: ("input", "text*"),
        2: ("output", "text*"),
        3: ("name", "text"),
        4: ("op_type", "text"),
        5: ("attribute", "Attribute*"),
        7: ("domain", "text"),
    },
    "Attribute": {
        1: ("name", "text"),
        3: ("i", "int64"),
        5: ("t", "Tensor"),
        6: ("g", "refused"),
        10: ("tensors", "refused"),
        11: ("graphs", "refused"),
        20: ("type", "int32"),
        22: ("sparse_tensor", "refused"),
        23: ("sparse_tensors", "refused"),
    },
    "Tensor": {
        1: ("dims", "int64*"),
        2: ("data_type", "int32"),
        4: ("data", "data*"),
        5: ("data", "data*"),
        6: ("data", "data*"),
        7: ("data", "data*"),
        8: ("name", "text"),
        9: ("raw_data", "data"),
        10: ("data", "data*"),
        11: ("data", "data*"),
        13: ("external_data", "Entry*"),
        14: ("data_location", "int32"),
    },
    "ValueInfo": {1: ("name", "text"), 2: ("type", "Type")},
    "Type": {
        1: ("tensor_type", "TensorType"),
        4: ("sequence_type", "refused"),
        5: ("map_type", "refused"),
        8: ("sparse_tensor_type", "refused"),
        9: ("optional_type", "refused"),
    },
    "TensorType": {1: ("elem_type", "int32"), 2: ("shape", "Shape")},
    "Shape": {1: ("dim", "Dimension*")},
    "Dimension": {1: ("dim_value", "int64"), 2: ("dim_param", "text")},
}
"""The messages of onnx.proto by field number: name and kind, with * if repeated. Of `data`, only the size is read.

No message may contain one of its own kind, as the decoder is recursive: what could is `refused`.
"""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_INTEGER_BITS = {"int32": 32, "int64": 64}
_MAX_VARINT_BYTES = 10
_MAX_FIELDS = 2_000_000

Message = Mapping[str, Any]
"""The fields of a message in the file, by name in onnx.proto: int, str, Message, or a list of these.

For weights it has only the size in bytes: as `raw_data`, or in the list `data` for all other fields with weights.
"""


def decode(path: Path) -> Message:
    """Decode the ModelProto in the file.

    Raises NotFoundError when there is no such file, and VerificationError for a file that is truncated or malformed,
    for fields that no exporter writes, for text that is not UTF-8, and for numbers out of range.
    """
    with reading(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise VerificationError(f"{path} is empty", COPY_FILE_AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Decoder(data, path).model()


class _Decoder:
    """Decodes protobuf messages by `_MESSAGES`; each length is compared with the rest of the enclosing message.

    Stricter than protobuf, which merges duplicate fields and skips fields with a wrong wire type: no writer makes such
    files, and this decoder must read exactly what onnxruntime reads.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._fields_left = _MAX_FIELDS

    def model(self) -> Message:
        return self._message("Model", 0, len(self._data))

    def _message(self, kind: str, position: int, end: int) -> dict[str, Any]:
        fields = _MESSAGES[kind]
        message: dict[str, Any] = {}
        while position < end:
            tag, start = self._varint(position, end)
            wire = tag & 7
            if wire == _BYTES:
                size, start = self._varint(start, end)
                stop = start + size
            elif wire == _VARINT:
                stop = self._varint(start, end)[1]
            elif wire in _FIXED_SIZES:
                stop = start + _FIXED_SIZES[wire]
            else:
                raise self._damaged(f"has an invalid protobuf field at byte {position}")
            if stop > end or not 8 <= tag < 1 << 32:
                raise self._damaged(f"has a field of {kind} at byte {position} that is truncated or has no number")
            self._count_field()
            if tag >> 3 in fields:
                self._keep(message, fields[tag >> 3], wire, (start, stop))
            position = stop
        return message

    def _keep(self, message: dict[str, Any], field: tuple[str, str], wire: int, place: tuple[int, int]) -> None:
        """Add a field's value to `message`, in a list if the field is repeated."""
        name, kind = field
        if kind == "refused":
            raise self._damaged(f"has {name}, which no exporter writes")
        base = kind.removesuffix("*")
        integer = base in _INTEGER_BITS
        value: Any
        if integer and (wire == _VARINT or (wire == _BYTES and base != kind)):
            value = list(self._integers(base, *place))
        elif integer or (wire != _BYTES and kind != "data*"):
            raise self._damaged(f"has field {name} with a wrong wire type before byte {place[1]}")
        elif base == "text":
            value = self._text(*place)
        elif base == "data":
            value = place[1] - place[0]
        else:
            value = self._message(base, *place)
        if base != kind:
            message.setdefault(name, []).extend(value if integer else (value,))
        elif name in message:
            raise self._damaged(f"has field {name} twice, the second time before byte {place[1]}")
        else:
            message[name] = value[0] if integer else value

    def _integers(self, kind: str, position: int, end: int) -> Iterator[int]:
        while position < end:
            number, position = self._varint(position, end)
            self._count_field()
            yield self._signed(kind, number)

    def _signed(self, kind: str, number: int) -> int:
        value = number - (1 << 64) if number >> 63 else number
        # protobuf would truncate a longer number to 32 bits, and so read another number than the one checked here.
        if not -1 << _INTEGER_BITS[kind] - 1 <= value < 1 << _INTEGER_BITS[kind] - 1:
            raise self._damaged(f"has the number {value}, which is out of range for {kind}")
        return value

    def _text(self, start: int, stop: int) -> str:
        try:
            return self._data[start:stop].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"has text at byte {start} that is not UTF-8") from error

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """The unsigned number at `position`, of at most 64 bits, and the position after it."""
        if position < end and self._data[position] < 0x80:
            return self._data[position], position + 1
        number = 0
        for index, byte in enumerate(self._data[position : min(position + _MAX_VARINT_BYTES, end)]):
            number |= (byte & 0x7F) << 7 * index
            if byte < 0x80 and number < 1 << 64:
                return number, position + index + 1
        raise self._damaged(f"has a number that is truncated or too long at byte {position}")

    def _count_field(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise self._damaged(f"has more than {_MAX_FIELDS} fields")

    def _damaged(self, problem: str) -> VerificationError:
        return VerificationError(f"{self._path} {problem}", COPY_FILE_AGAIN)
