"""Reads what the frequencies of a base's rotary embedding are divided by, for contexts longer than it had at first.

Neither transformers nor onnxruntime-genai's builder reads it from a GGUF file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune_export import architectures
from edgetune_export.adapters.shapes import Floats

from .quantize import dequantize_rows


def frequency_divisors(file: Path, header: GgufHeader) -> Floats | None:
    """Divisors of the frequencies, or one of all; in layers with a sliding window, llama.cpp divides none.

    None if nothing is divided. Raises IncompatibleError as in `Architecture.frequency_factor`.
    """
    architecture = architectures.of(header)
    factor, tensor = architecture.frequency_factor(header), header.tensors.get(architecture.frequency_tensor)
    if tensor is None:
        return None if factor == 1 else np.array([factor], np.float32)
    data = np.fromfile(file, np.uint8, tensor.nbytes, offset=tensor.offset)
    return factor * dequantize_rows(data, tensor).reshape(-1)
