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
from onnx import helper
from tiny import ENCODERS


@pytest.mark.parametrize("arch", ENCODERS)
def test_graphs_of_encoders_have_no_other_operators(
    arch: str, encoder_source: Callable[[str], EncoderSource], tmp_path: Path
) -> None:
    graph = write_encoder(encoder_source(arch), tmp_path, ())
    check_operators(read_onnx(graph), graph)


def test_operators_that_no_exporter_writes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    nodes = [helper.make_node("Snpe", ["y"], ["z"], domain="com.microsoft"), helper.make_node("Loop", ["", "z"], ["x"])]
    graph = helper.make_graph(nodes, "main", [], [])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    with pytest.raises(VerificationError, match=r"no exporter writes: Loop; com\.microsoft::Snpe"):
        check_operators(read_onnx(path), path)
