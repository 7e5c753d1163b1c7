from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from edgetune_export.backends.base import EncoderSource
from edgetune_export.backends.onnx.encoder import write_base as write_encoder
from edgetune_runtime import VerificationError
from edgetune_runtime.formats.onnx_file import read_onnx
from edgetune_runtime.formats.onnx_operators import check_operators
from onnx import TensorProto, helper
from tiny import ENCODERS


@pytest.mark.parametrize("arch", ENCODERS)
def test_graphs_of_encoders_have_no_other_operators(
    arch: str, encoder_source: Callable[[str], EncoderSource], tmp_path: Path
) -> None:
    graph = write_encoder(encoder_source(arch), tmp_path, ())
    check_operators(read_onnx(graph), graph)


def looping(operator: str, domain: str) -> onnx.GraphProto:
    """A loop without end whose body has this operator."""
    y = helper.make_tensor_value_info("y", TensorProto.BOOL, [])
    inside = helper.make_graph([helper.make_node(operator, ["y"], ["z"], domain=domain)], "body", [], [y])
    return helper.make_graph([helper.make_node("Loop", ["", "y"], ["z"], body=inside)], "main", [y], [y])


def test_operators_that_no_exporter_writes_are_refused_also_in_other_graphs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(looping("Snpe", "com.microsoft"), opset_imports=opsets), path)
    with pytest.raises(VerificationError, match=r"no exporter writes: Loop; com\.microsoft::Snpe"):
        check_operators(read_onnx(path), path)
