"""Builds the ONNX graph of a decoder: structure from onnxruntime-genai's builder, weights from the base's GGUF file."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.atomic import raising_out_of_space
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from edgetune_runtime.formats.gguf_sizes import number
from edgetune_runtime.formats.onnx_recurrence import CONV_INPUTS
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Floats
from edgetune_export.architectures.layout import base_columns, base_rows, in_model_order, name_map, tensor_of
from edgetune_export.base_file.quantize import dequantize_rows

from .weights import BLOCK, PackedWeights, pack, pack_floats, packed_bits, reorder, stack

GRAPH = "model.onnx"
MICROSOFT = "com.microsoft"
HEAD = "/lm_head/MatMul"
_EMBEDDING_SCALE = "/model/embed_tokens/Mul"
LOGITS_START = "logits_start"
ROWS = "/model/rows/"
"""The start of the names of nodes after which only the positions with logits are needed."""

# Smaller tensors stay in the graph's own file. External data is aligned so that pages can be mapped.
_EXTERNAL_BYTES = 1024
_ALIGNMENT = 4096
_RMS_NORM_OPSET = 23
_PART_VALUES = 1 << 26
"""Values of a matrix that are packed at once: what is computed on the way needs several times their memory."""
_PROJECTION = re.compile(r"/model/(?P<layer>layers\.\d+)/(?P<path>((attn|mlp|conv|linear_attn)/)?\w+)/MatMul")
_ATTENTION = re.compile(r"/model/layers\.(?P<layer>\d+)/attn/GroupQueryAttention")
# The inputs of GroupQueryAttention for cosines and sines.
_ROTARY_TABLES = (7, 8)
_POSITIONS = "position_ids"
_BLOCKS = {"attn": "self_attn"}
_CONVOLUTION = re.compile(r"/model/layers\.(?P<layer>\d+)/conv/CausalConvWithState")
_DECAY = ".A_log"
# The builder's names of norms and biases that have another name in the Hugging Face model.
_VECTORS = (
    (re.compile(r"\.attn\.(\w+_norm)\.layernorm\."), r".self_attn.\1."),
    (re.compile(r"\.layers\.\d+\.final_norm_layernorm\."), ".norm."),
    (re.compile(r"\.attn\.(\w+_proj)\.Add\."), r".self_attn.\1."),
    (re.compile(r"\.neg_exp_A$"), _DECAY),
)


@dataclass(frozen=True)
class Projection:
    """A matrix product of the graph, and the modules of the Hugging Face model whose stacked rows it computes."""

    node: ir.Node
    name: str
    modules: tuple[str, ...]


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


def projections(graph: ir.Graph, base: GgufHeader) -> list[Projection]:
    """The matrix products with weights of the base, in the graph's order."""
    fused = _modules_by_product(base)
    products = []
    for node in graph:
        name = (node.name or "").removesuffix("_Q4").removesuffix("_Q8")
        match = _PROJECTION.fullmatch(name)
        if match:
            layer, (*block, product) = f"model.{match['layer']}", match["path"].split("/")
            # The builder leaves some modules apart, whose names are those in transformers.
            parts = fused.get(module := ".".join([*(_BLOCKS.get(name, name) for name in block), product]), [module])
            name = ".".join([layer, *block, product])
            products.append(Projection(node, name, tuple(f"{layer}.{part}" for part in parts)))
        elif name == HEAD:
            products.append(Projection(node, "lm_head", ("lm_head",)))
    return products


def load_structure(folder: Path, base: GgufHeader) -> ir.Model:
    """Load the graph that `run_builder` wrote to `folder`, without matrices, with norms as standard ONNX operators."""
    model = ir.load(folder / GRAPH)
    architecture = architectures.of(base)
    for node in model.graph:
        # onnxruntime's own operator in ONNX's domain, which no other tool supports, not even `onnx.checker`.
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
        if node.name == _EMBEDDING_SCALE and architecture.scales_embeddings:
            scale = math.sqrt(number(base, "embedding_length"))
            factor = initializer(model.graph, "model.embed_tokens.scale", np.array([scale], np.float32))
            node.replace_input_with(1, factor)
        attention = _ATTENTION.fullmatch(node.name or "")
        if attention and not architecture.rotates(int(attention["layer"])):
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
            for table in _ROTARY_TABLES:
                node.replace_input_with(table, None)
    _compute_positions(model.graph)
    model.graph.opset_imports[""] = max(model.graph.opset_imports[""], _RMS_NORM_OPSET)
    return model


def _compute_positions(graph: ir.Graph) -> None:
    """Replace the input of positions, which only rotary embeddings apart from attention have, by the first new one."""
    inputs = {value.name: value for value in graph.inputs}
    positions = inputs.get(_POSITIONS)
    if positions is None:
        return
    lengths = [
        named_node("Shape", [inputs[name]], f"/model/positions/{name}/Shape", attributes={"start": 1, "end": 2})
        for name in ("attention_mask", "input_ids")
    ]
    first = named_node("Sub", [length.outputs[0] for length in lengths], "/model/positions/Sub")
    graph.insert_before(graph[0], [*lengths, first])
    ir.convenience.replace_all_uses_with(positions, first.outputs[0])
    graph.inputs.remove(positions)


def put_weights(model: ir.Model, base: Path, layers: str, vocabulary: str) -> None:
    """Replace the graph's products by MatMulNBits with the weights of the GGUF `base`, its embedding by a
    GatherBlockQuantized.

    `layers` says how the matrices of the layers are stored, `vocabulary` those of the embedding and the output layer:
    `auto` keeps the base's blocks if the operator supports them, converts other blocks to 8 bits and keeps floats;
    `int8` also converts floats to 8 bits; `fp32` dequantizes everything.
    """
    reader = _MatrixReader(base, layers)
    architecture = architectures.of(reader.header)
    for projection in projections(model.graph, reader.header):
        if projection.node.name != HEAD:
            replace_product(model.graph, projection.node, reader.of(projection.modules))
    fixed = {_node_of(module, "MatMul"): module for module in architecture.fixed_modules}
    embeddings = {_node_of(name, "Gather"): name for name in ("model.embed_tokens", *architecture.embeddings_in_file)}
    rows = _MatrixReader(base, vocabulary)
    for node in list(model.graph):
        if node.name == HEAD:
            replace_product(model.graph, node, rows.of(("lm_head",)))
        elif node.name in embeddings:
            name = embeddings[node.name]
            replace_gather(model.graph, node, rows.of((name,)), f"{name}.weight")
        elif node.name in fixed:
            replace_product(model.graph, node, reader.of((fixed[node.name],)))


def _node_of(module: str, operator: str) -> str:
    """The builder's name of a module's node."""
    return f"/{module.replace('.', '/')}/{operator}"


def _modules_by_product(base: GgufHeader) -> dict[str, list[str]]:
    """The linear modules of a layer that each matrix product of the graph has."""
    products: dict[str, list[str]] = {}
    for module in architectures.of(base).linear_modules:
        products.setdefault(module.product, []).append(module.name)
    return products


def put_vectors(graph: ir.Graph, base: GgufHeader, vectors: Mapping[str, Floats]) -> None:
    """Replace norms and biases by `vectors`, which have the names and values of the Hugging Face model.

    Raises IncompatibleError if the graph has no place for one of them.
    """
    unplaced, norm_offset = set(vectors), architectures.of(base).norm_offset
    renamed = architectures.of(base).norm_names.items()
    fused = {product: modules for product, modules in _modules_by_product(base).items() if len(modules) > 1}
    for initial in graph.initializers.values():
        name = initial.name or ""
        for pattern, replacement in _VECTORS:
            name = pattern.sub(replacement, name)
        for norm, own in renamed:
            name = name.replace(f".{norm}.", f".{own}.")
        product = next((product for product in fused if f".{product}." in name), None)
        parts = [name] if product is None else [name.replace(product, module) for module in fused[product]]
        if unplaced.isdisjoint(parts):
            continue
        values = np.concatenate([vectors[part] for part in parts])
        if name.endswith(_DECAY):
            values = -np.exp(values)
        # The gated norm of a delta net multiplies by its weights alone.
        elif "norm." in name and ".linear_attn." not in name:
            values = values + norm_offset
        initial.const_value = ir.Tensor(values.astype(np.float32), name=initial.name)
        unplaced.difference_update(parts)
    if unplaced:
        raise IncompatibleError(f"the ONNX graph has no place for {min(unplaced)}", "build for gguf")


class _MatrixReader:
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


def add_logits_start(graph: ir.Graph) -> None:
    """Add an optional input, the first position to compute logits for: a prompt needs only its last one.

    The default 0 computes all positions, as onnxruntime-genai expects.
    """
    start = optional_input(graph, LOGITS_START, np.zeros(1, np.int64), [1])
    ends = initializer(graph, "logits_end", np.array([np.iinfo(np.int64).max], np.int64))
    axes = initializer(graph, "logits_axis", np.array([1], np.int64))
    marked = [node for node in graph if (node.name or "").startswith(ROWS)]
    for node in marked or [node for node in graph if node.name == HEAD]:
        rows = named_node("Slice", [node.inputs[0], start, ends, axes], f"{node.name}/Slice")
        graph.insert_before(node, rows)
        if marked:
            # It is then unused.
            ir.convenience.replace_all_uses_with(node.outputs[0], rows.outputs[0])
        else:
            node.replace_input_with(0, rows.outputs[0])


def add_conv_inputs(graph: ir.Graph) -> None:
    """Add what each short convolution reads to the graph's outputs: with it, the engine can drop rejected tokens."""
    for node in list(graph):
        layer, read = _CONVOLUTION.fullmatch(node.name or ""), node.inputs[0] if node.inputs else None
        if layer is not None and read is not None:
            read.name = CONV_INPUTS.format(layer["layer"])
            graph.outputs.append(read)


def named_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value | None = None,
    attributes: Mapping[str, int | Sequence[int]] | None = None,
) -> ir.Node:
    """A node with an output named after it, with the type and shape of `like`."""
    node = ir.node(op_type, inputs, attributes, name=name)
    output = node.outputs[0]
    output.name = f"{name}/output_0"
    if like is not None:
        output.type, output.shape = like.type, like.shape
    return node


def optional_input(
    graph: ir.Graph, name: str, default: npt.NDArray[np.generic], shape: Sequence[int | str]
) -> ir.Value:
    """Add an input with a default value."""
    value = initializer(graph, name, default)
    value.shape = ir.Shape(shape)
    graph.inputs.append(value)
    return value


def initializer(graph: ir.Graph, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
    """Add a constant to the graph."""
    return _register(graph, ir.Tensor(np.ascontiguousarray(values), name=name))


def save_model(model: ir.Model, folder: Path) -> None:
    """Write the graph to `folder`, its weights to a file beside it; identical tensors are written once."""
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    for node in model.graph:
        # torch's exporter writes stack traces with paths of this machine.
        node.metadata_props.clear()
    folder.mkdir(parents=True, exist_ok=True)
    data_file = f"{GRAPH}.data"
    written: dict[bytes, int] = {}
    with raising_out_of_space(folder), (folder / data_file).open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes < _EXTERNAL_BYTES:
                # It may still be in the builder's data file, which is not kept.
                value.const_value = ir.tensor(tensor.numpy(), name=value.name)
                continue
            values = np.ascontiguousarray(tensor.numpy())
            data = values.data.cast("B")
            digest = hashlib.sha256(data).digest()
            if digest not in written:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                written[digest] = file.tell()
                file.write(data)
            value.const_value = ir.ExternalTensor(
                data_file,
                written[digest],
                data.nbytes,
                tensor.dtype,
                shape=ir.Shape(values.shape),
                name=value.name or "",
                base_dir=folder,
            )
        ir.save(model, folder / GRAPH)


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
        node.replace_input_with(0, _register(graph, table))
        return
    data, scales = _blocks(graph, weights, name, (weights.columns * weights.bits // 8,))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": weights.bits}
    _replace(graph, node, "GatherBlockQuantized", [data, node.inputs[1], scales], attributes)


def _blocks(graph: ir.Graph, weights: Matrix, name: str, row_shape: tuple[int, ...]) -> tuple[ir.Value, ir.Value]:
    """Initializers for quantized blocks, with `row_shape` for each row, and for their scales."""
    shape, data_name = (weights.rows, *row_shape), f"{name}_q{weights.bits}"
    data = _lazy(lambda: weights.packed().data.reshape(shape), shape, data_name, ir.DataType.UINT8)
    scales = _lazy(lambda: weights.packed().scales, (weights.rows, weights.columns // BLOCK), f"{name}_scales")
    return _register(graph, data), _register(graph, scales)


def _lazy(
    read: Callable[[], npt.NDArray[np.generic]],
    shape: Sequence[int],
    name: str | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.LazyTensor:
    """A tensor whose values are read on each access."""
    return ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(read())), dtype, ir.Shape(shape), name=name)


def _register(graph: ir.Graph, tensor: ir.Tensor[Any] | ir.LazyTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int]
) -> None:
    """Replace the node by another operator with the same name and output."""
    graph.opset_imports[MICROSOFT] = 1
    replacement = ir.node(op_type, inputs, attributes=attributes, domain=MICROSOFT, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [replacement], node.outputs, replacement.outputs)
