"""The options of ONNX graphs, which are the section `onnx` of a recipe."""

from __future__ import annotations

from typing import Literal, cast

from edgetune_runtime.engines.onnx import NAME

from edgetune_export.backends.format import FormatOptions, OptionsByFormat


class OnnxOptions(FormatOptions):
    """How the ONNX graph stores the weights of the GGUF base."""

    weights: Literal["auto", "fp32", "int8", "int4"] = "auto"
    """auto: keep q4_0 and q8_0 blocks and floats as they are, requantize other types to 8 bits. int8: as auto, but
    quantize floats to 8 bits too. fp32: dequantize everything. int4: requantize everything to 4 bits by `method`."""
    method: Literal["rtn", "k_quant", "gptq"] = "rtn"
    """Quantization algorithm for int4, as named by ONNX Runtime; rtn rounds to nearest, and gptq uses rows of the tasks
    for calibration."""

    @classmethod
    def of(cls, options: OptionsByFormat) -> OnnxOptions:
        """The options of this format; the defaults if there are none."""
        return cast(OnnxOptions, options.get(NAME, cls()))
