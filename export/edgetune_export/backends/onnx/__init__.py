"""Writes ONNX files for onnxruntime."""

from collections import Counter
from collections.abc import Iterable

from edgetune_runtime.bundle import CLASSIFICATION, GENERATION
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune_export.architectures.shape import BaseShape, SizedModule
from edgetune_export.backends.format import Format, OptionsByFormat

from .options import OnnxOptions


class _Onnx(Format):
    def writes_floats(self, options: OptionsByFormat) -> bool:
        """Whether the recipe has `weights: fp32`."""
        return OnnxOptions.of(options).weights == "fp32"

    def base_bytes(self, own_bytes: float, parameters: int, options: OptionsByFormat) -> float:
        """See `Format.base_bytes`; `weights: int8` and `int4` turn floats into at most 8 bits."""
        size = super().base_bytes(own_bytes, parameters, options)
        has_floats = OnnxOptions.of(options).weights in ("auto", "fp32")
        return size if has_floats else min(size, parameters * TENSOR_TYPES["q8_0"].bytes_per_value)

    def low_rank_bytes(self, base: BaseShape, ranks: Iterable[tuple[SizedModule, int]], dtype: str) -> float:
        """See `Format.low_rank_bytes`; q, k and v share a slot, whose B has the outputs of all three."""
        outputs = Counter[str]()
        for module in base.linear_modules:
            outputs[_slot_of(module)] += module.rows
        values = sum(rank * (module.columns + outputs[_slot_of(module)]) for module, rank in ranks)
        return self.adapter_bytes(values, dtype)

    def export_mb(self, own_bytes: float, parameters: int, options: OptionsByFormat) -> float:
        """See `Format.export_mb`; `weights: int4` adds a copy of the weights in float32, which is requantized."""
        copy_mb = parameters * 4 / 1e6 if OnnxOptions.of(options).weights == "int4" else 0.0
        return super().export_mb(own_bytes, parameters, options) + copy_mb


def _slot_of(module: SizedModule) -> str:
    # After the product of gate and up, which is split, each has its own.
    return module.name if module.product.endswith(".gate_up_proj") else module.product


FORMAT = _Onnx(
    dtype_key="onnx_dtype",
    tasks={GENERATION: "backend", CLASSIFICATION: "encoder"},
    # With `weights: int4`: it changes the base as much as a weak adapter does.
    requantized_kl={"int4": 0.5},
)
