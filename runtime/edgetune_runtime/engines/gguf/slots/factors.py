"""Reads the factors of LoRA files and puts those of several adapters side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, check_adapter, read_header
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .model import Factors

_Values = NDArray[Any]


def read_factors(path: Path, base: GgufHeader, name: str, scale: float, dtype: Any) -> Factors:  # noqa: ANN401
    """The factors in a LoRA file, with alpha and `scale` multiplied into B; `name` is the adapter's in errors.

    VerificationError for a damaged file, IncompatibleError for an adapter of another base, or one whose values are too
    large for `dtype`.
    """
    header = read_header(path)
    check_adapter(header, base, name)
    alpha = header.metadata["adapter.lora.alpha"]
    data = np.fromfile(path, np.uint8)
    factors = {}
    for tensor in header.tensors.values():
        weight, _, suffix = tensor.name.rpartition(".")
        if suffix == "lora_a":
            a, b = (_values(data, header.tensors[f"{weight}.lora_{which}"], name) for which in "ab")
            factor = scale * alpha / len(a) if alpha else scale
            if factor != 1:
                b = b.astype(np.float32) * np.float32(factor)
            factors[weight] = _stored(a, dtype, weight, name), _stored(b, dtype, weight, name)
    return factors


def side_by_side(adapters: Sequence[Factors]) -> Factors:
    """The factors of the sum of adapters: of the sum of their ranks."""
    if len(adapters) == 1:
        return adapters[0]
    weights = dict.fromkeys(weight for factors in adapters for weight in factors)
    pairs = {weight: [factors[weight] for factors in adapters if weight in factors] for weight in weights}
    return {
        weight: (np.concatenate([a for a, _ in members]), np.concatenate([b for _, b in members], axis=1))
        for weight, members in pairs.items()
    }


def _values(data: NDArray[np.uint8], tensor: TensorInfo, name: str) -> _Values:
    """The values of a tensor in a file's bytes, [rows, columns], as stored or in float32."""
    raw = data[tensor.offset : tensor.offset + tensor.nbytes]
    if raw.nbytes != tensor.nbytes:
        raise VerificationError(f"adapter {name!r} ends within {tensor.name!r}", COPY_FILE_AGAIN)
    return _READERS[tensor.type.name](raw).reshape(tensor.shape[::-1])


def _stored(values: _Values, dtype: Any, weight: str, name: str) -> _Values:  # noqa: ANN401
    if values.dtype != dtype:
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
    # A product of zero with a NaN or an infinity is not zero, so one value would be in all that the adapter adds.
    if not np.isfinite(values).all():
        message = f"adapter {name!r} has values for {weight!r} that are not finite in {np.dtype(dtype).name}"
        raise IncompatibleError(message, "open the bundle without slots, or export the adapter again")
    return values


def _of_q8_0(raw: NDArray[np.uint8]) -> _Values:
    blocks = raw.reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * scales


_READERS: Mapping[str, Callable[[NDArray[np.uint8]], _Values]] = {
    "f32": lambda raw: raw.view("<f4"),
    "f16": lambda raw: raw.view("<f2"),
    "bf16": lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "q8_0": _of_q8_0,
}
"""The values in the bytes of each type that an adapter can have."""
