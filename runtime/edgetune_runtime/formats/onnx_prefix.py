"""ONNX header in, its inputs of past keys and values out; the arrays of a prefix for them in, checked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN, first_of

from .onnx_file import OnnxHeader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")


def is_past(name: str) -> bool:
    """Whether an input of that name takes a layer's past keys or values."""
    return _PAST.fullmatch(name) is not None


def past_inputs(header: OnnxHeader) -> dict[str, int]:
    """The graph's inputs of past keys and values [batch, heads, positions, head size]: name to heads.

    VerificationError when one is no such tensor.
    """
    inputs = {}
    for name, value in header.inputs.items():
        if is_past(name):
            match value.shape:
                case (_, int(heads), _, _):
                    inputs[name] = heads
                case _:
                    raise VerificationError(f"the graph's input {name!r} has shape {value.shape}", COPY_FILE_AGAIN)
    return inputs


def check_prefix_arrays(
    arrays: Mapping[str, NDArray[np.generic]], inputs: Mapping[str, int], head_size: int, name: str
) -> int:
    """Check that the arrays of a prefix are sound and fit the graph's `inputs`; returns how many positions it takes.

    Raises VerificationError when the file contradicts itself and IncompatibleError when it is sound but not for this
    graph. `name` is the adapter's in the errors.
    """
    import numpy as np  # noqa: PLC0415 - files are read without it

    tokens = {array.shape[2] if array.ndim == 4 else 0 for array in arrays.values()}
    if len(tokens) != 1 or 0 in tokens:
        raise VerificationError(
            f"adapter {name!r} has no tensors, or not of the same number of tokens", COPY_FILE_AGAIN
        )
    _check_names(arrays, inputs, name)
    for key, array in arrays.items():
        if array.dtype not in (np.float32, np.float16) or not np.isfinite(array).all():
            message = f"adapter {name!r} has {key!r} as {array.dtype} or with values that are not finite"
            raise VerificationError(message, COPY_FILE_AGAIN)
        if (array.shape[0], array.shape[1], array.shape[3]) != (1, inputs[key], head_size):
            wanted = f"{inputs[key]} heads of {head_size}"
            message = f"adapter {name!r} has {key!r} of shape {array.shape}, the graph has {wanted}"
            raise IncompatibleError(message, "use the base that the adapter was trained on")
    return tokens.pop()


def _check_names(names: Collection[str], inputs: Collection[str], name: str) -> None:
    odd = sorted(set(names) ^ set(inputs))
    if odd:
        message = f"adapter {name!r} and the graph differ in {first_of([repr(item[:80]) for item in odd], 1)}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
