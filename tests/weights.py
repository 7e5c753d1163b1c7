"""Read weights from a base's GGUF file by module name, in the order of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from edgetune_export.architectures.layout import in_model_order, name_map, tensor_of
from edgetune_export.base_file.quantize import dequantize_rows
from edgetune_runtime.formats.gguf_file import read_header


def weights_in(base: Path) -> Callable[[str], np.ndarray]:
    """A function from a module's name to its weights [rows, columns]."""
    header = read_header(base)
    names = name_map(header)

    def weight(module: str) -> np.ndarray:
        tensor = tensor_of(module, header, names)
        with base.open("rb") as file:
            file.seek(tensor.offset)
            return in_model_order(dequantize_rows(file.read(tensor.nbytes), tensor), tensor, header)

    return weight
