"""The graph's inputs for past keys and values, and the check of a prefix's arrays against them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN, first_of

from .onnx_file import OnnxHeader
from .onnx_slots import value_problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")


def is_past(name: str) -> bool:
    """Whether the input of this name is a layer's past keys or values."""
    return _PAST.fullmatch(name) is not None


def past_inputs(header: OnnxHeader, head_size: int) -> dict[str, tuple[int, int]]:
    """The graph's inputs for past keys and values, [batch, heads, positions, head size]: name to heads and their size.

    An input without a fixed size has heads of `head_size`. VerificationError when one has another shape.
    """
    inputs = {}
    for name, value in header.inputs.items():
        if is_past(name):
            match value.shape:
                case (_, int(heads), _, int(size)):
                    inputs[name] = heads, size
                case (_, int(heads), _, _):
                    inputs[name] = heads, head_size
                case _:
                    raise VerificationError(f"the graph's input {name!r} has shape {value.shape}", COPY_FILE_AGAIN)
    return inputs


def check_prefix_arrays(
    arrays: Mapping[str, NDArray[np.generic]], inputs: Mapping[str, tuple[int, int]], name: str
) -> int:
    """Check that a prefix's arrays are valid and fit the graph's `inputs`; returns the prefix's length in tokens.

    Raises VerificationError when the file is invalid, and IncompatibleError when it is valid but not for this graph.
    `name` is the adapter's name in errors.
    """
    tokens = {array.shape[2] if array.ndim == 4 else 0 for array in arrays.values()}
    if len(tokens) != 1 or 0 in tokens:
        message = f"adapter {name!r} has no tensors, or tensors that do not have the same number of tokens"
        raise VerificationError(message, COPY_FILE_AGAIN)
    _check_names(arrays, inputs, name)
    for key, array in arrays.items():
        if problem := value_problem(array):
            raise VerificationError(f"adapter {name!r} is damaged: {key!r} {problem}", COPY_FILE_AGAIN)
        heads, size = inputs[key]
        if (array.shape[0], array.shape[1], array.shape[3]) != (1, heads, size):
            message = f"adapter {name!r} has {key!r} of shape {array.shape}, the graph has {heads} heads of {size}"
            raise IncompatibleError(message, "use the base that the adapter was trained on")
    return tokens.pop()


def _check_names(names: Collection[str], inputs: Collection[str], name: str) -> None:
    differing = sorted(set(names) ^ set(inputs))
    if differing:
        different = first_of([repr(item[:80]) for item in differing], 1)
        message = f"adapter {name!r} and the graph have different inputs: {different}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
