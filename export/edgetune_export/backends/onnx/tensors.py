"""Adds slots for scalings and bottlenecks to an ONNX graph, and makes the tensors with which an adapter fills them.

Each slot computes what a hook on the module computes in torch. A scaling multiplies a module's output, after its bias
and its low-rank slot, or its input; q, k and v share one input of factors, because they are one product, while gate and
up have one each. All bottlenecks of a block read the same values, and their outputs are summed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.onnx_file import OnnxHeader
from edgetune_runtime.formats.onnx_slots import (
    DOWN,
    DOWN_BIAS,
    GROUP_COLUMNS,
    SCALINGS,
    UP,
    UP_BIAS,
    Shape,
    bottleneck_slot,
    check_arrays,
    in_groups,
    is_grouped,
    slots_of,
)
from edgetune_runtime.wording import first_of

from edgetune_export.adapters.shapes import Activation, Bottleneck, Floats, Scaling, Tensors
from edgetune_export.architectures.shape import linear_modules

from .graph import Projection, named_node, optional_input, projections
from .slots import down_product, insert_after, refuse_misfits, split_after

METADATA = "edgetune.scalings"
"""Metadata key of the graph: JSON of {input: [[module of the Hugging Face model, its number of factors], …]}."""

_Parts = Sequence[tuple[str, int]]
_Reads = str


def add_tensor_slots(model: ir.Model, header: GgufHeader, adapters: Sequence[Tensors]) -> None:
    """Add the slots that these adapters need; call it before the low-rank slots are added.

    IncompatibleError lists modules whose inputs cannot be scaled because other modules share their product.
    """
    products = projections(model.graph, header)
    widths = {name: (module.columns, module.rows) for name, module in linear_modules(header).items()}
    # From the outside in: nodes that are inserted after a product later run before those already there.
    _add_bottlenecks(model.graph, products, widths, adapters)
    scaled: dict[str, set[str]] = {side: set() for side in SCALINGS}
    for adapter in adapters:
        for module, scaling in adapter.scalings.items():
            scaled[scaling.side].add(module)
    inputs = _scale_inputs(model.graph, products, widths, scaled["input"])
    inputs |= _scale_outputs(model.graph, products, widths, scaled["output"])
    model.metadata_props[METADATA] = json.dumps(inputs)


def fill_tensors(adapter: Tensors, header: OnnxHeader) -> dict[str, Floats]:
    """The adapter's tensors by input name, for the graph with this header.

    IncompatibleError lists modules and blocks without a slot or with another size.
    """
    slots = slots_of(header)
    inputs: Mapping[str, _Parts] = json.loads(header.metadata.get(METADATA, "{}"))
    refuse_misfits(adapter.name, [*_misfits(adapter.scalings, inputs), *_without_slot(adapter.bottlenecks, slots)])
    tensors: dict[str, Floats] = {}
    for name, parts in inputs.items():
        scalings = {module: adapter.scalings[module] for module, _ in parts if module in adapter.scalings}
        factors = {module: scaling.factors for module, scaling in scalings.items() if scaling.side == _side_of(name)}
        if factors:
            tensors[name] = np.concatenate([factors.get(module, np.ones(width, np.float32)) for module, width in parts])
    for block, bottleneck in adapter.bottlenecks.items():
        slot = _slot_of(block, bottleneck)
        down = bottleneck.down.T
        tensors[slot + DOWN] = in_groups(down) if is_grouped(slots[slot + DOWN]) else down
        tensors[slot + DOWN_BIAS] = bottleneck.down_bias
        tensors[slot + UP], tensors[slot + UP_BIAS] = bottleneck.up.T, bottleneck.up_bias
    check_arrays(tensors, slots, adapter.name)
    return tensors


def _side_of(name: str) -> str:
    """Whether an input of factors scales the outputs or the inputs of its modules."""
    return next(side for side, suffix in SCALINGS.items() if name.endswith(suffix))


def _misfits(scalings: Mapping[str, Scaling], inputs: Mapping[str, _Parts]) -> list[str]:
    """Problems with modules that have no input of factors, or another number of them."""
    widths = {(module, _side_of(name)): width for name, parts in inputs.items() for module, width in parts}
    problems = []
    for module, scaling in scalings.items():
        width = widths.get((module, scaling.side))
        if width is None:
            problems.append(f"no slot for the {scaling.side} of {module}")
        elif scaling.factors.shape != (width,):
            problems.append(f"{module} has factors of shape {scaling.factors.shape}, the base needs {width}")
    return problems


def _without_slot(bottlenecks: Mapping[str, Bottleneck], slots: Mapping[str, Shape]) -> list[str]:
    return [
        f"no slot for a bottleneck ({bottleneck.activation}, reads {bottleneck.reads}) of {block}"
        for block, bottleneck in bottlenecks.items()
        if _slot_of(block, bottleneck) + DOWN not in slots
    ]


def _slot_of(block: str, bottleneck: Bottleneck) -> str:
    return bottleneck_slot(block, bottleneck.activation, bottleneck.reads)


def _scale_inputs(
    graph: ir.Graph, products: Sequence[Projection], widths: Mapping[str, tuple[int, ...]], modules: Collection[str]
) -> dict[str, _Parts]:
    """Multiply the inputs of these modules' products by factors, only for these products."""
    scaled = [product for product in products if set(product.modules) & set(modules)]
    shared = sorted(
        set(modules) & {module for product in scaled if len(product.modules) > 1 for module in product.modules}
    )
    if shared:
        message = f"ONNX cannot scale the inputs of {first_of(shared, separator=', ')}: other modules share the product"
        raise IncompatibleError(message, "scale the outputs, or merge the adapter (merged: true)")
    inputs: dict[str, _Parts] = {}
    for product in scaled:
        name, width = product.name + SCALINGS["input"], widths[product.modules[0]][0]
        value = product.node.inputs[0]
        assert value is not None
        factors = optional_input(graph, name, np.ones(width, np.float32), [width])
        node = named_node("Mul", [value, factors], f"{name}/Mul", like=value)
        graph.insert_before(product.node, node)
        product.node.replace_input_with(0, node.outputs[0])
        inputs[name] = [(product.modules[0], width)]
    return inputs


def _scale_outputs(
    graph: ir.Graph, products: Sequence[Projection], widths: Mapping[str, tuple[int, ...]], modules: Collection[str]
) -> dict[str, _Parts]:
    """Multiply the outputs of these modules' products by factors."""
    inputs: dict[str, _Parts] = {}
    for product in products:
        for stem, value, own in _outputs(product):
            if set(own) & set(modules):
                name, parts = stem + SCALINGS["output"], [(module, widths[module][1]) for module in own]
                width = sum(width for _, width in parts)
                factors = optional_input(graph, name, np.ones(width, np.float32), [width])
                insert_after(graph, value, [named_node("Mul", [value, factors], f"{name}/Mul", like=value)])
                inputs[name] = parts
    return inputs


def _outputs(product: Projection) -> list[tuple[str, ir.Value, tuple[str, ...]]]:
    """The outputs of a product after its bias: name, value and modules; separate for gate and up."""
    split = split_after(product)
    if split is not None:
        stem = product.name.rpartition(".")[0]
        ends = [module.rpartition(".")[2] for module in product.modules]
        values = zip(ends, product.modules, split.outputs, strict=True)
        return [(f"{stem}.{end}", value, (module,)) for end, module, value in values]
    value = product.node.outputs[0]
    for node in value.consumers():
        if node.op_type == "Add" and any(other is not None and other.is_initializer() for other in node.inputs):
            value = node.outputs[0]
    return [(product.name, value, product.modules)]


def _add_bottlenecks(
    graph: ir.Graph,
    products: Sequence[Projection],
    widths: Mapping[str, tuple[int, ...]],
    adapters: Sequence[Tensors],
) -> None:
    """Add one slot per kind of bottleneck to each block's output."""
    kinds: dict[str, dict[tuple[Activation, _Reads], int]] = {}
    for adapter in adapters:
        for block, bottleneck in adapter.bottlenecks.items():
            ranks, kind = kinds.setdefault(block, {}), (bottleneck.activation, bottleneck.reads)
            ranks[kind] = max(ranks.get(kind, 0), len(bottleneck.down))
    for block, variants in kinds.items():
        own_products = [product for product in products if product.modules[0].rpartition(".")[0] == block]
        if not own_products:
            continue
        # In the graph's order, the first product reads the block's input and the last computes its output.
        first, last = own_products[0], own_products[-1]
        ((_, value, (output,)),) = _outputs(last)
        entry = first.node.inputs[0]
        assert entry is not None
        nodes, total = [], value
        for (activation, reads), rank in variants.items():
            slot = bottleneck_slot(block, activation, reads)
            read, columns = (entry, widths[first.modules[0]][0]) if reads == "input" else (value, widths[output][1])
            grouped = rank > GROUP_COLUMNS
            nodes += _network(graph, slot, activation, read, (columns, widths[output][1]), grouped=grouped)
            nodes.append(named_node("Add", [total, nodes[-1].outputs[0]], f"{slot}/Add", like=value))
            total = nodes[-1].outputs[0]
        insert_after(graph, value, nodes)


def _network(
    graph: ir.Graph, slot: str, activation: Activation, read: ir.Value, shape: tuple[int, int], *, grouped: bool
) -> list[ir.Node]:
    """The nodes of act(read·down + down_bias)·up + up_bias, of rank 0 by default; `shape` is [in, out]."""
    columns, rows = shape
    # One rank symbol per slot: with a shared symbol, adapters with different ranks per module fail.
    rank = f"{slot}.rank"
    nodes = down_product(graph, slot + DOWN, read, (columns, rank), grouped=grouped)
    down_bias = optional_input(graph, slot + DOWN_BIAS, np.zeros(0, np.float32), [rank])
    up = optional_input(graph, slot + UP, np.zeros((0, rows), np.float32), [rank, rows])
    up_bias = optional_input(graph, slot + UP_BIAS, np.zeros(rows, np.float32), [rows])
    nodes.append(named_node("Add", [nodes[-1].outputs[0], down_bias], f"{slot}/down_Add"))
    nodes += _activation(activation, nodes[-1].outputs[0], slot)
    nodes.append(named_node("MatMul", [nodes[-1].outputs[0], up], f"{slot}/up"))
    nodes.append(named_node("Add", [nodes[-1].outputs[0], up_bias], f"{slot}/up_Add"))
    return nodes


def _activation(activation: Activation, value: ir.Value, slot: str) -> list[ir.Node]:
    if activation == "relu":
        return [named_node("Relu", [value], f"{slot}/Relu")]
    if activation == "gelu":
        return [named_node("Gelu", [value], f"{slot}/Gelu")]
    # ONNX has a SiLU operator only from operator set 24 on.
    gate = named_node("Sigmoid", [value], f"{slot}/Sigmoid")
    return [gate, named_node("Mul", [value, gate.outputs[0]], f"{slot}/Mul")]
