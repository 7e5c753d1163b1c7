"""The graph's inputs for recurrent states, and its outputs of what convolutions read.

Each input has an output for the state after the step: `past.N.conv` is [1, channels, tokens], the last inputs of a
convolution, and `past.N.recurrent` the sums of a delta net. With the output `conv_inputs.N`, [1, channels, tokens of
the step], the state of a convolution after any token of the step can be computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgetune_runtime.errors import VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN

from .onnx_file import OnnxHeader

CONV_INPUTS = "conv_inputs.{}"
"""Name of the output with what the convolution of a layer reads."""

_PAST = re.compile(r"past\.(?P<layer>\d+)\.(?P<kind>conv|recurrent)")


@dataclass(frozen=True)
class Recurrence:
    """The recurrent states of a graph: the shapes of its inputs by name, without the batch.

    `conv_inputs` are the outputs of what convolutions read, by the name of the state; empty unless the states after all
    tokens of a step can be computed from them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    conv_inputs: Mapping[str, str]

    @property
    def values(self) -> int:
        """Numbers in the states of a sequence."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def inputs_per_token(self) -> int:
        """Numbers that convolutions read per token, if states can be computed from them; else 0."""
        return sum(self.shapes[name][0] for name in self.conv_inputs)


def recurrence_of(header: OnnxHeader) -> Recurrence:
    """The recurrent states of a graph; VerificationError for one of unknown size, or without an output."""
    shapes, conv_inputs = {}, {}
    for name, value in header.inputs.items():
        if (past := _PAST.fullmatch(name)) is None:
            continue
        _, *shape = value.shape or ("",)
        sizes = tuple(size for size in shape if isinstance(size, int) and size > 0)
        if len(sizes) < len(shape) or len(sizes) not in (2, 3) or present_name(name) not in header.outputs:
            raise VerificationError(f"the graph's input {name!r} has shape {value.shape} or no output", COPY_FILE_AGAIN)
        shapes[name] = sizes
        inputs = header.outputs.get(CONV_INPUTS.format(past["layer"]))
        if past["kind"] == "conv" and inputs is not None and inputs.shape[1:2] == sizes[:1]:
            conv_inputs[name] = inputs.name
    return Recurrence(shapes, conv_inputs if len(conv_inputs) == len(shapes) else {})


def present_name(past: str) -> str:
    """The output for the state after the step of an input."""
    return past.replace("past", "present", 1)
