from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.backends.onnx.slots import METADATA, down_product, fill
from edgetune_runtime.formats.onnx_file import OnnxHeader, Value
from edgetune_runtime.formats.onnx_slots import in_groups

COLUMNS, MOST_TOKENS, MULTIPLICATIONS = 576, 24, 65536
A = "slot.lora_A.weight"


def product(columns: int, threads: int) -> onnxruntime.InferenceSession:
    """A session with nothing but the product of an input `x` [1, tokens, columns] with a grouped A."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    read = ir.Value(name="x", type=float32, shape=ir.Shape([1, "tokens", columns]))
    graph = ir.Graph([read], [], nodes=[], opset_imports={"": 23}, name="product")
    nodes = down_product(graph, A, read, (columns, "rank"), grouped=True)
    graph.extend(nodes)
    graph.outputs.append(nodes[-1].outputs[0])
    graph.outputs[0].type, graph.outputs[0].shape = float32, ir.Shape(["tokens", "rank"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("rank", [20, 24, 48])
def test_a_grouped_product_rounds_a_row_alike_however_many_rows_a_step_has(rank: int, threads: int) -> None:
    assert MOST_TOKENS * COLUMNS * rank > MULTIPLICATIONS, "onnxruntime divides no smaller product among threads"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, MOST_TOKENS, COLUMNS)).astype(np.float32)
    a = rng.normal(size=(COLUMNS, rank)).astype(np.float32)
    session, groups = product(COLUMNS, threads), np.ascontiguousarray(in_groups(a))
    rows = {count: session.run(None, {"x": x[:, :count], A: groups})[0] for count in range(2, MOST_TOKENS + 1)}
    np.testing.assert_allclose(rows[MOST_TOKENS], x[0] @ a, atol=1e-3)
    assert [count for count in rows if not np.array_equal(rows[count], rows[MOST_TOKENS][:count])] == []


def test_a_grouped_product_without_an_adapter_has_rank_0() -> None:
    (rows,) = product(COLUMNS, 1).run(None, {"x": np.ones((1, 3, COLUMNS), np.float32)})
    assert rows.shape == (3, 0)


def test_columns_that_groups_cannot_divide_are_followed_by_zeros() -> None:
    parts = {"q": (6, 8, 4), "k": (6, 8, 6), "v": (6, 8, 9)}  # inputs, outputs, rank
    slots = {"slot": [(name, columns, rows) for name, (columns, rows, _) in parts.items()]}
    inputs = {A: Value(A, 1, ("groups", 6, "width")), "slot.lora_B.weight": Value("slot.lora_B.weight", 1, ("r", 24))}
    header = OnnxHeader(inputs, {}, {}, (), {METADATA: json.dumps(slots)}, frozenset())
    rng = np.random.default_rng(0)
    deltas = {
        name: Delta(*(rng.normal(size=shape).astype(np.float32) for shape in ((rank, columns), (rows, rank))))
        for name, (columns, rows, rank) in parts.items()
    }
    tensors = fill(LowRank("command", "lora", deltas), header)
    assert tensors[A].shape == (2, 6, 10)
    x = rng.normal(size=(3, 6)).astype(np.float32)
    expected = np.concatenate([x @ delta.a.T @ delta.b.T for delta in deltas.values()], axis=1)
    added = np.concatenate(list(x @ tensors[A]), axis=1) @ tensors["slot.lora_B.weight"]
    np.testing.assert_allclose(added, expected, atol=1e-5)
