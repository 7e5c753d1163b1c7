"""Writes tensors for a graph's optional inputs as an `.onnx_adapter` file that is tied to its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from edgetune_runtime.engines.onnx.arrays import model_version
from edgetune_runtime.formats.atomic import replacing

from edgetune_export.adapters.shapes import Floats
from edgetune_export.backends.base import DTYPES, check_f16_range


def write_tensors(tensors: Mapping[str, Floats], out: Path, *, dtype: str, base_fingerprint: str) -> None:
    """Write the tensors, by the name of their input, to `out`; `dtype` is f32 or f16.

    Raises VerificationError if a value is beyond the range of f16, OutOfSpaceError if the disk is full.
    """
    if dtype == "f16":
        for name, tensor in tensors.items():
            check_f16_range(name, tensor, "write it with onnx_dtype: f32")
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor, DTYPES[dtype]))
        for name, tensor in tensors.items()
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(model_version(base_fingerprint))
    file.set_parameters(values)
    with replacing(out) as temporary:
        file.export_adapter(str(temporary))
