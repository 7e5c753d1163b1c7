"""Counts the values of each type in the graphs and adapter files of this format, for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path

import onnx_ir as ir
from edgetune_runtime.formats.onnx_adapter import adapter_arrays

# Position of the quantized data among an operator's inputs; the later inputs are scales and zero points.
_DATA = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
_SCALES = 2
_FLOATS = {ir.DataType.FLOAT: "f32", ir.DataType.FLOAT16: "f16"}


def values_by_type(file: Path) -> dict[str, int]:
    """The number of values in each type of a graph (`.onnx`) or an adapter: f32, f16, and int8 or int4 in blocks.

    Not counted: scales and zero points of blocks, integers that the graph computes with, and a second use of the same
    data, such as tied embeddings. The weights of a graph are not read.
    """
    return _in_graph(ir.load(file).graph) if file.suffix == ".onnx" else _in_adapter(file)


def _in_graph(graph: ir.Graph) -> dict[str, int]:
    bits, scales = _quantized_data(graph)
    counted: dict[Hashable, tuple[str, int]] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or name in scales:
            continue
        data = (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else name
        if name in bits:
            counted[data] = f"int{bits[name]}", tensor.nbytes * 8 // bits[name]
        elif tensor.dtype in _FLOATS:
            counted[data] = _FLOATS[tensor.dtype], tensor.size
    return _sums(counted.values())


def _quantized_data(graph: ir.Graph) -> tuple[dict[str, int], set[str]]:
    """Bits per value of each quantized initializer, and the names of the scales and zero points."""
    bits: dict[str, int] = {}
    scales: set[str] = set()
    for node in graph:
        if node.op_type in _DATA:
            data = node.inputs[_DATA[node.op_type]]
            assert data is not None
            bits[data.name or ""] = node.attributes.get_int("bits", 4)
            scales.update(value.name or "" for value in node.inputs[_SCALES:] if value is not None)
    return bits, scales


def _in_adapter(file: Path) -> dict[str, int]:
    arrays, _ = adapter_arrays(file, file.stem)
    return _sums((_FLOATS[ir.DataType.from_numpy(array.dtype)], array.size) for array in arrays.values())


def _sums(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for kind, values in counts:
        total[kind] += values
    return {kind: values for kind, values in total.items() if values}
