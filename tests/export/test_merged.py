from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edgetune_export.adapters.shapes import Merged
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf import backend as gguf
from edgetune_export.base_file.quantize import dequantize_rows, quantize_gguf
from edgetune_export.merged import source_of_merged
from edgetune_runtime.formats.gguf_file import read_header


@pytest.fixture
def source_in(tiny_source: Callable[[str], Source], tmp_path: Path) -> Callable[[str], Source]:
    """`source_in(quantization)`: the tiny base in that quantization."""

    def make(quantization: str) -> Source:
        source = tiny_source("llama")
        path = source.path
        if quantization != "f16":
            path = tmp_path / f"{quantization}.gguf"
            quantize_gguf(source.path, path, quantization)
        return replace(source, path=path, work=tmp_path / "work")

    return make


@pytest.mark.parametrize(
    ("held", "requested", "merged"),
    [
        ("q4_0", None, "q8_0"),
        ("q4_1", None, "q8_0"),
        ("q8_0", None, "q8_0"),
        ("f16", None, "f16"),
        ("q4_0", "q4_0", "q4_0"),
        ("q4_0", "f16", "f16"),
        ("f16", "q8_0", "q8_0"),
    ],
)
def test_merged_models_have_8_bits_at_least_unless_others_are_requested(
    held: str, requested: str | None, merged: str, source_in: Callable[[str], Source]
) -> None:
    source = source_in(held)
    found = source_of_merged(source, requested)
    assert read_header(found.path).main_type.name == merged
    assert (found.path == source.path) == (merged == held)


@pytest.mark.parametrize("on_grid", [False, True])
def test_a_base_in_the_requested_mix_of_types_keeps_them(
    on_grid: bool, source_in: Callable[[str], Source], tmp_path: Path
) -> None:
    source = replace(source_in("q4_k_m"), quantization="q4_k_m")
    assert len(source.header.layer_types) > 1
    assert source_of_merged(source, "q4_k_m", trains_on_grid=on_grid) is source
    assert source_of_merged(source, "q8_0", trains_on_grid=on_grid).path != source.path
    assert source.model is not None
    name = "model.layers.0.mlp.down_proj.weight"
    weight = dict(source.model.named_parameters())[name].detach().numpy()
    gguf.write_merged(Merged("one", "lora", {name: lambda: weight}, on_grid=on_grid), source, tmp_path / "out.gguf")
    types = {tensor.name: tensor.type for tensor in read_header(tmp_path / "out.gguf").tensors.values()}
    assert types == {tensor.name: tensor.type for tensor in source.header.tensors.values()}


def test_the_merged_file_of_another_base_is_not_used_again(source_in: Callable[[str], Source]) -> None:
    source = source_in("q4_0")
    other = replace(source, fingerprint="f" * 64)
    assert source_of_merged(source, None).path != source_of_merged(other, None).path


def test_a_merged_model_in_8_bits_is_closer_to_the_trained_weights_than_in_4(
    source_in: Callable[[str], Source], tmp_path: Path
) -> None:
    source = source_in("q4_0")
    assert source.model is not None
    name = "model.layers.0.mlp.down_proj"
    rng = np.random.default_rng(0)
    weight = dict(source.model.named_parameters())[f"{name}.weight"].detach().numpy()
    trained = weight + rng.normal(0, 0.02 * weight.std(), weight.shape).astype(np.float32)
    errors = []
    for quantization in ("q4_0", None):
        finer = source_of_merged(source, quantization)
        gguf.write_merged(Merged("one", "full", {f"{name}.weight": lambda: trained}), finer, tmp_path / "out.gguf")
        header = read_header(tmp_path / "out.gguf")
        tensor = header.tensors["blk.0.ffn_down.weight"]
        data = (tmp_path / "out.gguf").read_bytes()[tensor.offset :][: tensor.nbytes]
        errors.append(float(np.abs(dequantize_rows(data, tensor) - trained).mean()))
    assert errors[1] < errors[0] / 10
