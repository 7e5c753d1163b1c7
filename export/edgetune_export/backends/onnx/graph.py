"""Builds the ONNX graph of a decoder: structure from onnxruntime-genai's builder, weights from the base's GGUF file."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.atomic import raising_out_of_space
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.gguf_sizes import number
from edgetune_runtime.formats.onnx_recurrence import CONV_INPUTS
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Floats

from .matrices import MatrixReader, register, replace_gather, replace_product

GRAPH = "model.onnx"
HEAD = "/lm_head/MatMul"
_EMBEDDING_SCALE = "/model/embed_tokens/Mul"
LOGITS_START = "logits_start"
ROWS = "/model/rows/"
"""The start of the names of nodes after which only the positions with logits are needed."""

# Smaller tensors stay in the graph's own file. External data is aligned so that pages can be mapped.
_EXTERNAL_BYTES = 1024
_ALIGNMENT = 4096
_RMS_NORM_OPSET = 23
_PROJECTION = re.compile(r"/model/(?P<layer>layers\.\d+)/(?P<path>((attn|mlp|conv|linear_attn)/)?\w+)/MatMul")
_ATTENTION = re.compile(r"/model/layers\.(?P<layer>\d+)/attn/GroupQueryAttention")
# The builder's names of these tables, but for layers with a sliding window.
_COSINES, _SINES = (re.compile(rf"{name}_cache(_global)?") for name in ("cos", "sin"))
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
    reader = MatrixReader(base, layers)
    architecture = architectures.of(reader.header)
    for projection in projections(model.graph, reader.header):
        if projection.node.name != HEAD:
            replace_product(model.graph, projection.node, reader.of(projection.modules))
    fixed = {_node_of(module, "MatMul"): module for module in architecture.fixed_modules}
    embeddings = {_node_of(name, "Gather"): name for name in ("model.embed_tokens", *architecture.embeddings_in_file)}
    rows = MatrixReader(base, vocabulary)
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


def divide_frequencies(graph: ir.Graph, divisors: Floats) -> None:
    """Divide the frequencies of the tables of the rotary embedding, all of them or each by its own divisor."""
    cosines, sines = (
        next(value for name, value in graph.initializers.items() if pattern.fullmatch(name))
        for pattern in (_COSINES, _SINES)
    )
    assert cosines.const_value is not None and sines.const_value is not None
    table = cosines.const_value.numpy()
    angles = np.arctan2(sines.const_value.numpy()[1], table[1]) / divisors
    angles = np.outer(np.arange(len(table), dtype=np.float32), angles)
    for value, function in ((cosines, np.cos), (sines, np.sin)):
        value.const_value = ir.Tensor(function(angles), name=value.name)


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
    return register(graph, ir.Tensor(np.ascontiguousarray(values), name=name))


def save_model(model: ir.Model, folder: Path) -> None:
    """Write the graph to `folder`, its weights to a file beside it; identical tensors are written once."""
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    for node in model.graph:
        # torch's exporter writes stack traces with paths of this machine.
        node.metadata_props.clear()
    # The builder adds the commit of a git repository around its package.
    model.producer_version = (model.producer_version or "").partition("+")[0]
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
