"""Which inputs of a graph are recurrent states, and when earlier ones can be computed."""

from __future__ import annotations

import pytest
from edgetune_runtime import VerificationError
from edgetune_runtime.formats.onnx_file import OnnxHeader, Value
from edgetune_runtime.formats.onnx_recurrence import recurrence_of

STATES = {"past.0.conv": ("b", 8, 2), "past.2.conv": ("b", 8, 2)}
READ = {"conv_inputs.0": ("b", 8, "s"), "conv_inputs.2": ("b", 8, "s")}


def header(inputs: dict[str, tuple[int | str, ...]], outputs: dict[str, tuple[int | str, ...]]) -> OnnxHeader:
    """A graph whose states also are outputs."""
    outputs = outputs | {name.replace("past", "present"): shape for name, shape in inputs.items()}
    values = ({name: Value(name, 1, shape) for name, shape in group.items()} for group in (inputs, outputs))
    return OnnxHeader(*values, {}, (), {}, frozenset())


def test_states_of_convolutions_alone_can_be_computed_from_what_these_read() -> None:
    found = recurrence_of(header(STATES | {"past_key_values.1.key": ("b", 2, "p", 4)}, READ))
    assert (found.values, found.inputs_per_token) == (32, 16)
    without = {**STATES, "past.3.recurrent": ("b", 4, 8, 8)}
    for inputs, outputs in ((STATES, {}), (STATES, {**READ, "conv_inputs.2": ("b", 9, "s")}), (without, READ)):
        assert recurrence_of(header(inputs, outputs)).inputs_per_token == 0
    assert recurrence_of(header(without, READ)).values == 32 + 256
    assert recurrence_of(header({}, {})).values == 0


@pytest.mark.parametrize("shape", [(), (1,), ("b", "c", 2), ("b", 8, 0), ("b", 8), ("b", 8, 2, 2, 2)])
def test_states_of_unknown_size_are_refused(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(VerificationError, match=r"the graph's input 'past\.0\.conv' has shape"):
        recurrence_of(header({"past.0.conv": shape}, {}))
