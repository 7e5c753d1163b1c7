"""The tensors in adapter files, and their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.onnx_adapter import adapter_arrays
from edgetune_runtime.formats.onnx_slots import summed

Arrays = Mapping[str, NDArray[np.float32]]


def read_arrays(path: Path, name: str, fingerprint: str | None) -> dict[str, NDArray[np.generic]]:
    """The tensors in an adapter's file, as `adapter_arrays` reads them.

    IncompatibleError when they are for another base than the one with `fingerprint`, if given.
    """
    arrays, version = adapter_arrays(path, name)
    if fingerprint is not None and version != model_version(fingerprint):
        raise IncompatibleError(f"adapter {name!r} was made for another base", "build the bundle again")
    return arrays


def model_version(fingerprint: str) -> int:
    """The model version in an adapter file: the first 28 bits of the base's fingerprint, in a 32-bit field."""
    return int(fingerprint[:7], 16)


def to_float32(arrays: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """The tensors as the graph takes them."""
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def sum_of_adapters(parts: Sequence[tuple[Arrays, float]]) -> Arrays:
    """The tensors of the sum of several adapters, given with their scales; see `summed`."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    names = {name: None for arrays, _ in parts for name in arrays}
    return {name: summed(name, [(arrays[name], scale) for arrays, scale in parts if name in arrays]) for name in names}
