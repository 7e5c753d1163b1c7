"""Adds slots for low-rank adapters to an ONNX graph, and makes the tensors with which an adapter fills them.

A slot is a pair of optional inputs of a product: y = x·W + (x·A)·B, with A [in, rank] and B [rank, out], of rank 0
by default. The fused product of q, k and v has one slot for all three: their A are concatenated, and B is
block-diagonal, because in decoding extra nodes cost more than the zeros in B. Gate and up, whose B are wide, have a
slot each after the split of their product (docs/measurements.md). A of a slot that an adapter fills with more than
`GROUP_COLUMNS` columns is in groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.onnx_file import OnnxHeader
from edgetune_runtime.formats.onnx_slots import GROUP_COLUMNS, LORA_A, LORA_B, in_groups, is_grouped
from edgetune_runtime.wording import first_of

from edgetune_export.adapters.shapes import Delta, Floats, LowRank
from edgetune_export.architectures.shape import linear_modules

from .graph import Projection, initializer, named_node, optional_input, projections

METADATA = "edgetune.slots"
"""Metadata key of the graph: JSON of {slot: [[module of the Hugging Face model, its inputs, its outputs], …]}."""

Slots = Mapping[str, Sequence[tuple[str, int, int]]]

_FLAT = "edgetune.tokens_by_rank"


def add_slots(model: ir.Model, header: GgufHeader, adapters: Sequence[LowRank]) -> None:
    """Add a slot to each product that computes a module of these adapters, and list the slots in the metadata."""
    sized, modules = linear_modules(header), {module for adapter in adapters for module in adapter.modules}
    slots: dict[str, list[tuple[str, int, int]]] = {}
    for projection in projections(model.graph, header):
        if not set(projection.modules) & set(modules):
            continue
        parts = [(name, sized[name].columns, sized[name].rows) for name in projection.modules]
        split = split_after(projection)
        if split is None:
            slots[projection.name] = parts
            shape = parts[0][1], sum(rows for *_, rows in parts)
            add_slot(model.graph, projection, shape, grouped=_is_wide(projection.modules, adapters))
            continue
        for part, plain in zip(parts, split.outputs, strict=True):
            if part[0] in modules:
                name = f"{projection.name.rpartition('.')[0]}.{part[0].rpartition('.')[2]}"
                slots[name] = [part]
                grouped = _is_wide(part[:1], adapters)
                _add_pair(model.graph, name, projection.node.inputs[0], plain, (part[1], part[2]), grouped=grouped)
    model.metadata_props[METADATA] = json.dumps(slots)


def _is_wide(modules: Sequence[str], adapters: Sequence[LowRank]) -> bool:
    """Whether one of the adapters has more columns for a slot of these modules than a group has."""
    widths = (sum(a.modules[module].rank for module in modules if module in a.modules) for a in adapters)
    return any(width > GROUP_COLUMNS for width in widths)


def slots_of(metadata: Mapping[str, str]) -> Slots:
    """The slots that `add_slots` listed in a graph's metadata."""
    raw = json.loads(metadata[METADATA])
    return {slot: [(module, columns, rows) for module, columns, rows in parts] for slot, parts in raw.items()}


def fill(adapter: LowRank, header: OnnxHeader) -> dict[str, Floats]:
    """The adapter's tensors by input name: A [in, rank] or [groups, in, width], and B [rank, out], with the scale in B.

    IncompatibleError lists modules without a slot of the graph with this header, or with another size.
    """
    slots = slots_of(header.metadata)
    sizes = {module: (rows, columns) for parts in slots.values() for module, columns, rows in parts}
    problems = [_misfit(module, delta, sizes) for module, delta in adapter.modules.items()]
    refuse_misfits(adapter.name, [problem for problem in problems if problem])
    tensors: dict[str, Floats] = {}
    for slot, parts in slots.items():
        deltas = [(delta, start) for delta, start in _placed(adapter, parts) if delta is not None]
        if deltas:
            a, b = np.concatenate([d.a for d, _ in deltas]).T, _block_diagonal(deltas, sum(rows for *_, rows in parts))
            if is_grouped(header.inputs[slot + LORA_A].shape):
                # Zeros, so that few groups of equal width hold any rank.
                zeros = -a.shape[1] % -(-a.shape[1] // GROUP_COLUMNS)
                a, b = in_groups(np.pad(a, ((0, 0), (0, zeros)))), np.pad(b, ((0, zeros), (0, 0)))
            tensors[slot + LORA_A], tensors[slot + LORA_B] = a, b
    return tensors


def _placed(adapter: LowRank, parts: Sequence[tuple[str, int, int]]) -> list[tuple[Delta | None, int]]:
    """The delta of each module of a slot, and the index of its first output."""
    starts = np.cumsum([0, *(rows for *_, rows in parts)])
    return [(adapter.modules.get(module), int(start)) for (module, *_), start in zip(parts, starts, strict=False)]


def _block_diagonal(deltas: Sequence[tuple[Delta, int]], outputs: int) -> Floats:
    b = np.zeros((sum(delta.rank for delta, _ in deltas), outputs), np.float32)
    row = 0
    for delta, start in deltas:
        b[row : row + delta.rank, start : start + delta.b.shape[0]] = delta.b.T
        row += delta.rank
    return b


def refuse_misfits(name: str, problems: Sequence[str]) -> None:
    """IncompatibleError if there are problems of the adapter `name` with the graph."""
    if problems:
        message = f"adapter {name!r} does not fit the graph: {first_of(problems)}"
        raise IncompatibleError(message, "export the base and its adapters together")


def _misfit(module: str, delta: Delta, sizes: Mapping[str, tuple[int, int]]) -> str:
    if module not in sizes:
        return f"no slot for {module}"
    return delta.misfit(module, *sizes[module])


def add_slot(graph: ir.Graph, projection: Projection, shape: tuple[int, int], *, grouped: bool = False) -> None:
    """Add a slot to a product, with the projection's name; `shape` is [in, out]. Groups need a batch of one."""
    node = projection.node
    _add_pair(graph, projection.name, node.inputs[0], node.outputs[0], shape, grouped=grouped)


def split_after(projection: Projection) -> ir.Node | None:
    """The node that splits the output of a fused gate/up product, after a bias if there is one; None for other products
    and if gate and up are a single module."""
    if not projection.name.endswith(".gate_up_proj") or len(projection.modules) == 1:
        return None
    users = projection.node.outputs[0].consumers()
    if users and users[0].op_type == "Add":
        users = users[0].outputs[0].consumers()
    return users[0]


def _add_pair(
    graph: ir.Graph, name: str, read: ir.Value | None, plain: ir.Value, shape: tuple[int, int], *, grouped: bool
) -> None:
    """Add (read·A)·B to the value `plain`; `shape` is [in, out]."""
    columns, outputs = shape
    # One rank symbol per slot: with a shared symbol, adapters with different ranks per module fail.
    rank = f"{name}.rank"
    down = down_product(graph, name + LORA_A, read, (columns, rank), grouped=grouped)
    b = optional_input(graph, name + LORA_B, np.zeros((0, outputs), np.float32), [rank, outputs])
    up = named_node("MatMul", [down[-1].outputs[0], b], f"{name}/lora_B")
    added = named_node("Add", [plain, up.outputs[0]], f"{name}/lora_Add", like=plain)
    insert_after(graph, plain, [*down, up, added])


def down_product(
    graph: ir.Graph, name: str, read: ir.Value | None, shape: tuple[int, str], *, grouped: bool
) -> list[ir.Node]:
    """The nodes of read·A for the optional input `name` [in, rank] or, grouped, [groups, in, width] (see onnx_slots).

    A grouped product, for a batch of one, has the shape [tokens, rank].
    """
    columns, rank = shape
    if not grouped:
        a = optional_input(graph, name, np.zeros((columns, 0), np.float32), [columns, rank])
        return [named_node("MatMul", [read, a], f"{name}/MatMul")]
    sizes: list[int | str] = [f"{name}.groups", columns, f"{name}.width"]
    a = optional_input(graph, name, np.zeros((1, columns, 0), np.float32), sizes)
    product = named_node("MatMul", [read, a], f"{name}/MatMul")
    by_token = named_node("Transpose", product.outputs, f"{name}/Transpose", attributes={"perm": [1, 0, 2]})
    flat = graph.initializers.get(_FLAT) or initializer(graph, _FLAT, np.array([0, -1], np.int64))
    return [product, by_token, named_node("Reshape", [by_token.outputs[0], flat], f"{name}/Reshape")]


def insert_after(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes that read a value; its other users, also the graph's outputs, then read the last node's output."""
    result, producer = nodes[-1].outputs[0], value.producer()
    assert producer is not None
    for user, index in value.uses():
        if user not in nodes:
            user.replace_input_with(index, result)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = result
            value.name, result.name = result.name, value.name
    graph.insert_after(producer, nodes)
