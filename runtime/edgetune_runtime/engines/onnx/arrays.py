"""The tensors of adapters, and their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.formats.onnx_tensors import is_tensor, summed

Arrays = Mapping[str, NDArray[np.float32]]


def sum_of_adapters(parts: Sequence[tuple[Arrays, float]]) -> Arrays:
    """The tensors of the sum of several adapters: low-rank factors concatenated, with each scale in B."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    tensors: dict[str, NDArray[np.float32]] = {}
    for name in {name: None for arrays, _ in parts for name in arrays}:
        own = [(arrays[name], scale) for arrays, scale in parts if name in arrays]
        if is_tensor(name):
            tensors[name] = summed(name, own)
            continue
        is_b = name.endswith(".lora_B.weight")
        scaled = [array * np.float32(scale) if is_b else array for array, scale in own]
        tensors[name] = np.ascontiguousarray(np.concatenate(scaled, axis=0 if is_b else 1), np.float32)
    return tensors
