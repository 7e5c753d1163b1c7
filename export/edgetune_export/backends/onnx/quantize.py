"""Quantizes the products of a float graph to 4 bits with ONNX Runtime's MatMulNBitsQuantizer.

It is for bases whose blocks the operators do not support in 4 bits, in bundles without a GGUF file: no other format has
to have the same weights, so any quantization algorithm can be used.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from .graph import HEAD
from .options import OnnxOptions
from .weights import BLOCK


def requantize(model: ir.Model, options: OnnxOptions, calibration: Sequence[Sequence[int]], head_size: int) -> ir.Model:
    """The graph with all products except the output layer in 4 bits per weight, in blocks of 32.

    `head_size` is that of inputs without a fixed one; calibration starts with an empty KV cache. gptq without rows for
    calibration rounds to nearest, as only the speed of the graph matters then.
    """
    # Matrices that were replaced are still listed, without values.
    RemoveUnusedNodesPass()(model)
    quantizer = _Quantizer(
        ir.to_proto(model),
        block_size=BLOCK,
        accuracy_level=4,
        nodes_to_exclude=[HEAD],
        algo_config=_config(model, options, calibration, head_size),
    )
    # It draws progress bars on standard output, where a caller may expect JSON.
    with redirect_stdout(io.StringIO()):
        quantizer.process()
    quantized: ir.Model = ir.from_proto(quantizer.model.model)
    return quantized


class _Quantizer(MatMulNBitsQuantizer):  # type: ignore[misc]
    """Excludes the output layer with gptq too, which ignores `nodes_to_exclude`."""

    def _generate_q4_node_config(self) -> dict[str, Any]:
        return {**super()._generate_q4_node_config(), HEAD: "fp32"}


def _config(model: ir.Model, options: OnnxOptions, calibration: Sequence[Sequence[int]], head_size: int) -> Any:  # noqa: ANN401 - the library's classes share no public type
    if options.method == "k_quant":
        return KQuantWeightOnlyQuantConfig()
    if options.method == "gptq" and calibration:
        return GPTQWeightOnlyQuantConfig(_Rows(model, calibration, head_size), block_size=BLOCK)
    return DefaultWeightOnlyQuantConfig(block_size=BLOCK, accuracy_level=4)


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """Token rows as inputs of the graph, with an empty KV cache and recurrent states of zeros."""

    def __init__(self, model: ir.Model, rows: Sequence[Sequence[int]], head_size: int) -> None:
        self._empty = {}
        for value in model.graph.inputs:
            name, shape = value.name or "", value.shape
            if shape is not None and name.startswith("past_key_values."):
                size = shape[3] if isinstance(shape[3], int) else head_size
                self._empty[name] = np.zeros((1, int(str(shape[1])), 0, size), np.float32)
            elif shape is not None and name.startswith("past."):
                self._empty[name] = np.zeros((1, *(int(str(size)) for size in shape.dims[1:])), np.float32)
        self._rows = iter(rows)

    def get_next(self) -> dict[str, Any] | None:
        """The inputs of the next row; None after the last."""
        row = next(self._rows, None)
        if row is None:
            return None
        ids = np.array([row], np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), **self._empty}
