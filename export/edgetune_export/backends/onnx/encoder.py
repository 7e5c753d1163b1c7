"""Writes an encoder as an ONNX graph with slots for adapters and heads, and a task's adapter and head as one file.

The graph comes from `torch.onnx.export`: it is maintained in PyTorch and exports any module, so the graph includes the
pooling. transformers' OnnxExporter calls it too, with patches that encoders do not need; it is experimental and only
supports transformers' classes. optimum's exporter needs transformers below 5, and onnxruntime-genai's builder only
supports decoders. The exporter records the module of each node, by which slots find their products.
"""

from __future__ import annotations

import ast
import json
import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from edgetune_runtime.engines.onnx.encoder import HEAD_BIAS, HEAD_WEIGHT, LOGITS, POOLED, TRAINED_CONTEXT_LENGTH
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats import BASE_FINGERPRINT
from edgetune_runtime.formats.atomic import raising_out_of_space
from edgetune_runtime.formats.onnx_file import read_onnx
from edgetune_runtime.formats.tokenizer_json import TOKENIZER_NAME
from edgetune_runtime.wording import first_of

from edgetune_export.adapters.shapes import Floats, LowRank, Merged
from edgetune_export.backends.base import EncoderSource
from edgetune_export.pooling import Pooled

from . import value_types
from .adapter import write_tensors
from .graph import GRAPH, Projection, named_node, optional_input, save_model
from .matrices import Matrix, replace_gather, replace_product
from .options import OnnxOptions
from .slots import METADATA, add_slot, fill
from .weights import BLOCK, pack_floats

SHAPES = ("low_rank",)
ADAPTER_FILE = "adapter.onnx_adapter"
MODEL_FILE = f"onnx/{GRAPH}"
PACKAGES = ("onnxruntime",)
values_by_type = value_types.values_by_type

# The first with an Attention operator, with which the graph has the fewest nodes.
_OPSET = 23
_SCOPES = "pkg.torch.onnx.name_scopes"
_NAMES = ("input_ids", "attention_mask")


def write_base(source: EncoderSource, folder: Path, adapters: Sequence[LowRank]) -> Path:
    """Write the encoder into `folder/onnx`, with slots for these adapters and for a head; returns its graph.

    Raises IncompatibleError when the graph has no product for a module, OutOfSpaceError when the disk is full.
    """
    assert source.model is not None
    out = folder / MODEL_FILE
    modules = {module for adapter in adapters for module in adapter.modules}
    linear = {name: m for name, m in source.model.named_modules() if isinstance(m, torch.nn.Linear)}
    model = ir.load(_structure(source))
    products = _products(model.graph, linear)
    missing = sorted(modules - {product.name for product in products})
    if missing:
        message = f"the exported graph has no product of its own for {first_of(missing, 1)}"
        raise IncompatibleError(message, "leave it out of target_modules")
    if weight_type(source) == "int8":
        products = _round(model.graph, linear, products)
    slots = {}
    for product in products:
        if product.name in modules:
            module = linear[product.name]
            slots[product.name] = [(product.name, module.in_features, module.out_features)]
            add_slot(model.graph, product, (module.in_features, module.out_features))
    _add_head(model.graph, source.model.config.hidden_size)
    model.metadata_props[METADATA] = json.dumps(slots)
    model.metadata_props[BASE_FINGERPRINT] = source.fingerprint
    model.metadata_props[TRAINED_CONTEXT_LENGTH] = str(source.trained_context_length)
    save_model(model, out.parent)
    with raising_out_of_space(out):
        shutil.copyfile(source.path.with_name(TOKENIZER_NAME), out.with_name(TOKENIZER_NAME))
    return out


def write_adapter(adapter: LowRank, base: Path, out: Path, *, dtype: str = "f32", base_fingerprint: str) -> None:
    """Write the adapter, with its head, as tensors for the slots of the graph `base`; `dtype` is f32 or f16.

    Raises IncompatibleError when it does not fit the slots or has no head, and what `write_tensors` raises.
    """
    if adapter.head is None:
        raise IncompatibleError(f"adapter {adapter.name!r} has no head for labels", "train it for text-classification")
    tensors = fill(adapter, read_onnx(base))
    head = {HEAD_WEIGHT: adapter.head.weight.T, HEAD_BIAS: adapter.head.bias}
    write_tensors({**tensors, **head}, out, dtype=dtype, base_fingerprint=base_fingerprint)


def write_merged(merged: Merged, _source: EncoderSource, _out: Path) -> None:
    """Refused: a merged encoder would need a graph per task."""
    raise IncompatibleError(f"adapter {merged.name!r}: encoders cannot be merged", "leave merged out")


def weight_type(source: EncoderSource) -> str:
    """The type of the graph's matrices: int8, or f32 if they are not quantized."""
    return "f32" if OnnxOptions.of(source.options).weights == "fp32" else "int8"


def _structure(source: EncoderSource) -> Path:
    """The graph of the encoder with its pooling, for any batch and length, exported once per build."""
    out = source.work / "structure.onnx"
    if out.exists():
        return out
    assert source.model is not None
    wrapped = Pooled(source.model).eval()
    # Two rows of different lengths: the exporter treats a dimension of 1 as fixed.
    tokens, mask = torch.full((2, 6), 1), torch.ones((2, 6), dtype=torch.int64)
    mask[1, 4:] = 0
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with _quiet():
        program = torch.onnx.export(
            wrapped,
            (tokens, mask),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=list(_NAMES),
            output_names=[POOLED],
            dynamic_shapes=(dimensions, dimensions),
        )
    assert program is not None
    with raising_out_of_space(out):
        source.work.mkdir(parents=True, exist_ok=True)
        program.save(out, external_data=True)
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log messages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _products(graph: ir.Graph, linear: Collection[str]) -> list[Projection]:
    """The products of linear modules, named as the modules."""
    products = []
    for node in graph:
        module = _module_of(node)
        if node.op_type == "MatMul" and module in linear:
            products.append(Projection(node, module, (module,)))
    return products


def _module_of(node: ir.Node) -> str:
    """The encoder's module that the node belongs to; "" if none."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return scopes[-2].removeprefix("encoder.") if len(scopes) > 1 else ""


def _round(graph: ir.Graph, linear: dict[str, torch.nn.Linear], products: list[Projection]) -> list[Projection]:
    """Round the weights of products and of the token embedding to 8 bits, if the block size divides their columns."""
    for product in products:
        weight = _floats(linear[product.name].weight)
        if weight.shape[1] % BLOCK == 0:
            replace_product(graph, product.node, Matrix.of(pack_floats(weight)))
    for node in list(graph):
        table = node.inputs[0].const_value if node.op_type == "Gather" and node.inputs[0] is not None else None
        if table is not None and len(table.shape) == 2 and _module_of(node).endswith("word_embeddings"):
            rows = np.ascontiguousarray(table.numpy(), np.float32)
            if rows.shape[1] % BLOCK == 0:
                replace_gather(graph, node, Matrix.of(pack_floats(rows)), f"{_module_of(node)}.weight")
    by_name = {node.name: node for node in graph}
    return [Projection(by_name[product.node.name], product.name, product.modules) for product in products]


def _add_head(graph: ir.Graph, hidden: int) -> None:
    """Add the logits of the labels: a product on the pooled layer with an optional head, empty by default."""
    weight = optional_input(graph, HEAD_WEIGHT, np.zeros((hidden, 0), np.float32), [hidden, "labels"])
    bias = optional_input(graph, HEAD_BIAS, np.zeros(0, np.float32), ["labels"])
    pooled = graph.outputs[0]
    product = named_node("MatMul", [pooled, weight], "classifier/MatMul")
    added = named_node("Add", [product.outputs[0], bias], "classifier/Add")
    logits = added.outputs[0]
    logits.name, logits.type, logits.shape = LOGITS, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "labels"])
    graph.extend([product, added])
    graph.outputs.insert(0, logits)


def _floats(tensor: torch.Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().float().numpy(), np.float32)
