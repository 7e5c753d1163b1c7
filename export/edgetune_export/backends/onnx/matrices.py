"""Reads the matrices of a GGUF base, and puts them into a graph as weights of onnxruntime's quantized operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from edgetune_runtime.formats.gguf_file import TensorInfo, read_header

from edgetune_export.adapters.shapes import Floats
from edgetune_export.architectures.layout import base_columns, base_rows, in_model_order, name_map, tensor_of
from edgetune_export.base_file.quantize import dequantize_rows

from .weights import BLOCK, PackedWeights, pack, pack_floats, packed_bits, reorder, stack

_MICROSOFT = "com.microsoft"
_PART_VALUES = 1 << 26
"""Values of a matrix that are packed at once: what is computed on the way needs several times their memory."""


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] with this many bits (None: float32), read on demand, so that only one is in memory."""

    rows: int
    columns: int
    bits: int | None
    read: Callable[[], PackedWeights | Floats]

    @classmethod
    def of(cls, packed: PackedWeights) -> Matrix:
        """The matrix of weights that are in memory."""
        return cls(packed.rows, packed.columns, packed.bits, lambda: packed)

    def floats(self) -> Floats:
        """The values in float32."""
        values = self.read()
        assert not isinstance(values, PackedWeights)
        return values

    def packed(self) -> PackedWeights:
        """The values in quantized blocks."""
        values = self.read()
        assert isinstance(values, PackedWeights)
        return values


class MatrixReader:
    """Reads matrices from the base's file by their Hugging Face names."""

    def __init__(self, base: Path, weights: str) -> None:
        self._path, self._weights = base, weights
        self.header = read_header(base)
        self._names = name_map(self.header)
        self._last: tuple[tuple[str, ...], PackedWeights] | None = None

    def of(self, modules: Sequence[str]) -> Matrix:
        """The stacked matrices of these modules; as floats if one of them is not quantized."""
        tensors = [tensor_of(module, self.header, self._names) for module in modules]
        rows, columns = sum(tensor.shape[1] for tensor in tensors), tensors[0].shape[0]
        bits = [self._bits(tensor) for tensor in tensors]
        if None in bits:
            return Matrix(rows, columns, None, lambda: np.concatenate([self._floats(module) for module in modules]))
        return Matrix(rows, columns, max(filter(None, bits)), lambda: self._stacked(tuple(modules)))

    def _stacked(self, modules: tuple[str, ...]) -> PackedWeights:
        """The stacked matrices, quantized; caches the last one, because its blocks and scales are read separately."""
        if self._last is None or self._last[0] != modules:
            self._last = (modules, stack([self._packed(module) for module in modules]))
        return self._last[1]

    def _bits(self, tensor: TensorInfo) -> int | None:
        """Bits per weight in the graph, None for float32."""
        if self._weights == "fp32" or tensor.shape[0] % BLOCK:
            return None
        return packed_bits(tensor) or (8 if self._weights == "int8" else None)

    def _packed(self, module: str) -> PackedWeights:
        tensor = tensor_of(module, self.header, self._names)
        parts = self._parts(tensor, _PART_VALUES)
        packed = stack([pack(data, part) or pack_floats(dequantize_rows(data, part)) for part, data in parts])
        return reorder(packed, base_rows(tensor, self.header), base_columns(tensor, self.header))

    def _floats(self, module: str) -> Floats:
        tensor = tensor_of(module, self.header, self._names)
        ((whole, data),) = self._parts(tensor, math.prod(tensor.shape))
        return in_model_order(dequantize_rows(data, whole), tensor, self.header)

    def _parts(self, tensor: TensorInfo, values: int) -> Iterator[tuple[TensorInfo, bytes]]:
        """The matrix in parts of whole rows with about so many values, and the bytes of each."""
        columns, rows = tensor.shape
        step = max(values // columns, 1)
        with self._path.open("rb") as file:
            file.seek(tensor.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                part = replace(tensor, shape=(columns, count), nbytes=tensor.nbytes // rows * count)
                yield part, file.read(part.nbytes)


def replace_product(graph: ir.Graph, node: ir.Node, weights: Matrix) -> None:
    """Replace the weights of a product by `weights` [outputs, columns]."""
    weight = node.inputs[1]
    assert weight is not None
    if weights.bits is None:
        weight.const_value = _lazy(lambda: weights.floats().T, (weights.columns, weights.rows), weight.name)
        return
    name = f"{(weight.name or '').removesuffix('.weight')}.weight"
    data, scales = _blocks(graph, weights, name, (weights.columns // BLOCK, BLOCK * weights.bits // 8))
    # accuracy_level 4 rounds activations to 8 bits, which the fast kernels need.
    attributes = {"K": weights.columns, "N": weights.rows, "bits": weights.bits, "block_size": BLOCK}
    _replace(graph, node, "MatMulNBits", [node.inputs[0], data, scales], {**attributes, "accuracy_level": 4})


def replace_gather(graph: ir.Graph, node: ir.Node, weights: Matrix, name: str) -> None:
    """Replace the weights of an embedding, called `name` in the graph, by `weights` [rows, columns]."""
    if weights.bits is None:
        table = _lazy(weights.floats, (weights.rows, weights.columns), f"{name}_rows")
        node.replace_input_with(0, register(graph, table))
        return
    data, scales = _blocks(graph, weights, name, (weights.columns * weights.bits // 8,))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": weights.bits}
    _replace(graph, node, "GatherBlockQuantized", [data, node.inputs[1], scales], attributes)


def _blocks(graph: ir.Graph, weights: Matrix, name: str, row_shape: tuple[int, ...]) -> tuple[ir.Value, ir.Value]:
    """Initializers for quantized blocks, with `row_shape` for each row, and for their scales."""
    shape, data_name = (weights.rows, *row_shape), f"{name}_q{weights.bits}"
    data = _lazy(lambda: weights.packed().data.reshape(shape), shape, data_name, ir.DataType.UINT8)
    scales = _lazy(lambda: weights.packed().scales, (weights.rows, weights.columns // BLOCK), f"{name}_scales")
    return register(graph, data), register(graph, scales)


def _lazy(
    read: Callable[[], npt.NDArray[np.generic]],
    shape: Sequence[int],
    name: str | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.LazyTensor:
    """A tensor whose values are read on each access."""
    return ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(read())), dtype, ir.Shape(shape), name=name)


def register(graph: ir.Graph, tensor: ir.Tensor[Any] | ir.LazyTensor) -> ir.Value:
    """Add a tensor to the graph as an initializer of its name."""
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int]
) -> None:
    """Replace the node by another operator with the same name and output."""
    graph.opset_imports[_MICROSOFT] = 1
    replacement = ir.node(op_type, inputs, attributes=attributes, domain=_MICROSOFT, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [replacement], node.outputs, replacement.outputs)
