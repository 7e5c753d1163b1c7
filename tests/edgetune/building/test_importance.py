from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from edgetune_export import architectures
from edgetune_export.architectures.layout import in_file_order, name_map
from edgetune_export.base_file.importance import Importance, write_imatrix
from edgetune_export.base_file.quantize import dequantize_rows, quantize_gguf
from edgetune_runtime.bundle import read_manifest
from edgetune_runtime.engines.gguf.base import GgufTokenizer
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from recipes import PLAIN, adapter_of, lights, make_recipe, write_recipe
from tiny import ARCHITECTURES
from trainings import QUIET, Listening

from edgetune.bases import Base, load_torch
from edgetune.building import builders
from edgetune.building.decoder import importance
from edgetune.building.decoder.importance import importance_of
from edgetune.building.pipeline import build
from edgetune.building.plan import plan_build
from edgetune.cli.main import main
from edgetune.recipe.model import Recipe
from edgetune.tasks.task import read_task

NAME = "blk.1.ffn_down.weight"
ADAPTERS = {"command": adapter_of(**PLAIN)}


def values_of(path: Path, tensor: TensorInfo) -> np.ndarray:
    return dequantize_rows(np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset), tensor)


def types_of(header: GgufHeader) -> dict[str, str]:
    return {name: tensor.type.name for name, tensor in header.tensors.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_matrix_has_the_mean_squares_of_the_inputs_of_each_matrix(
    arch: str, tiny_base: Callable[[str], Base], tmp_path: Path
) -> None:
    base = tiny_base(arch)
    recipe = make_recipe(tmp_path, base.path)
    found = importance_of(recipe, QUIET)
    model, task = load_torch(base, torch.float32), read_task("command", recipe)
    tokenizer = GgufTokenizer(base.path)
    squares, tokens = np.zeros(base.header.tensors[base.header.output_tensor].shape[0]), 0
    with torch.inference_mode():
        for row in task.tokenize(tokenizer, recipe.context_length)[0]:
            states = model.get_decoder()(input_ids=torch.tensor([row.tokens])).last_hidden_state[0]
            squares += states.double().square().sum(0).numpy()
            tokens += len(row.tokens)
    tokenizer.close()
    assert found.tokens == tokens
    assert found.mean_squares[base.header.output_tensor] == pytest.approx(squares / tokens, rel=1e-4)
    names = name_map(base.header)
    fixed = architectures.of(base.header).fixed_modules
    linear = {
        names.get_name(name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in fixed
    }
    tied = {} if "output.weight" in base.header.tensors else {"output": base.header.output_tensor}
    assert set(found.mean_squares) == {tied.get(name, f"{name}.weight") for name in linear}
    assert {name: values.size for name, values in found.mean_squares.items()} == {
        name: base.header.tensors[name].shape[0] for name in found.mean_squares
    }


def test_the_columns_have_the_order_of_the_file(tiny_base: Callable[[str], Base], tmp_path: Path) -> None:
    base = tiny_base("qwen35")
    recipe = make_recipe(tmp_path, base.path)
    found = importance_of(recipe, QUIET)
    model, task, squares = load_torch(base, torch.float32), read_task("command", recipe), []
    output = model.get_submodule("model.layers.0.linear_attn.out_proj")
    output.register_forward_pre_hook(lambda _, inputs: squares.append(inputs[0][0].double().square()))
    with closing(GgufTokenizer(base.path)) as tokenizer, torch.inference_mode():
        for row in task.tokenize(tokenizer, recipe.context_length)[0]:
            model.get_decoder()(input_ids=torch.tensor([row.tokens]))
    tensor = base.header.tensors["blk.0.ssm_out.weight"]
    expected = in_file_order(torch.cat(squares).mean(0).numpy()[None].astype(np.float32), tensor, base.header)
    assert found.mean_squares[tensor.name] == pytest.approx(expected[0], rel=1e-4)


def test_reading_ends_at_a_number_of_tokens(
    tiny_base: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "MAX_TOKENS", 30)
    assert 30 <= importance_of(make_recipe(tmp_path, tiny_base("llama").path), QUIET).tokens < 60


@pytest.mark.parametrize("quantization", ["q4_0", "iq4_nl", "q5_1"])
def test_columns_with_large_inputs_get_smaller_errors(
    quantization: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_gguf("llama")
    header = read_header(source)
    weights = np.random.default_rng(0).uniform(0, 1, header.tensors[NAME].shape[0]).astype(np.float32) ** 8
    quantize_gguf(source, tmp_path / "plain.gguf", quantization)
    quantize_gguf(source, tmp_path / "own.gguf", quantization, importance=Importance({NAME: weights}, 1))
    exact, errors = values_of(source, header.tensors[NAME]), {}
    for name in ("plain", "own"):
        file = tmp_path / f"{name}.gguf"
        errors[name] = (weights * (values_of(file, read_header(file).tensors[NAME]) - exact) ** 2).sum()
    assert errors["own"] < 0.8 * errors["plain"]


@pytest.mark.parametrize("quantization", ["q4_0", "q5_0"])
def test_a_matrix_leaves_the_types_that_onnx_stores_exactly(
    quantization: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_gguf("gemma3")
    whole = {name: np.ones(tensor.shape[0], np.float32) for name, tensor in read_header(source).tensors.items()}
    quantize_gguf(source, tmp_path / "plain.gguf", quantization)
    quantize_gguf(source, tmp_path / "own.gguf", quantization, importance=Importance(whole, 1))
    assert types_of(read_header(tmp_path / "own.gguf")) == types_of(read_header(tmp_path / "plain.gguf"))


def test_a_build_quantizes_its_base_with_the_matrix_of_its_rows_once_and_takes_more_adapters(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"quantization": "q4_0", "training": {"max_steps": 1, "evals": 1}}
    recipe = make_recipe(tmp_path, tiny_gguf("llama"), ADAPTERS, imatrix="auto", **keys)
    home = build(recipe, tmp_path / "home", progress=QUIET).bundle
    manifest, listening = read_manifest(home), Listening()

    def base_of(recipe: Recipe, folder: str = "home.work") -> Base:
        return builders.load(recipe.task).make_base(plan_build(recipe).plan, tmp_path / folder, listening, None)

    assert manifest.plan["steps"] == ["requantize to q4_0 with an importance matrix"]
    assert manifest.recipe["imatrix"] == "auto"
    again = base_of(recipe)
    assert again.fingerprint == manifest.base.fingerprint
    assert not any(line.startswith("quantizing") for line in listening.lines)
    plain = base_of(make_recipe(tmp_path, tiny_gguf("llama"), ADAPTERS, **keys), "plain")
    assert plain.fingerprint != again.fingerprint
    assert plain.header.values_by_type == again.header.values_by_type
    listening.lines.clear()
    base_of(make_recipe(tmp_path, tiny_gguf("llama"), data={"rows.jsonl": lights(12)}, imatrix="auto", **keys))
    assert sum(line.startswith("quantizing") for line in listening.lines) == 1

    file, rows = home / manifest.base.files["gguf"], {"rows.jsonl": lights(14)}
    adapters = {"more": adapter_of(**PLAIN)}
    more = make_recipe(tmp_path / "more", file, adapters, data=rows, imatrix="auto", **keys)
    build(more, home, progress=QUIET, into=True)
    assert asdict(read_manifest(home).base) == asdict(manifest.base)
    assert set(read_manifest(home).adapters) == {"command", "more"}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_both_formats_have_the_output_layer_in_the_type_that_is_asked_for(
    arch: str, tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"quantization": "q4_0+q4_0", "targets": ["gguf", "onnx"], "imatrix": "auto"}
    recipe = make_recipe(tmp_path, tiny_gguf(arch), ADAPTERS, **keys)
    build(recipe, tmp_path / "home", progress=QUIET)
    base = read_manifest(tmp_path / "home").base
    assert base.quantization == "q4_0+q4_0"
    assert set(base.values_by_type["gguf"]) == {"f32", "q4_0"}
    assert set(base.values_by_type["onnx"]) == {"f32", "int4"}


def test_the_file_has_what_llama_quantize_reads(tmp_path: Path) -> None:
    means = {NAME: np.array([1, 2, 4], np.float32), "output.weight": np.array([3, 5], np.float32)}
    write_imatrix(Importance(means, 1300), tmp_path / "imatrix.gguf", "rows of home")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if key.startswith(("general.", "imatrix."))}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["rows of home"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (2, 512)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {f"{name}.{part}" for name in means for part in ("in_sum2", "counts")}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"}
    for name, values in means.items():
        counts = tensors[f"{name}.counts"].data.item()
        assert counts == 1300
        assert (tensors[f"{name}.in_sum2"].data[0] / counts).tolist() == values.tolist()


@pytest.mark.usefixtures("forked_converter")
def test_imatrix_writes_the_file_and_prints_its_path(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, tiny_folder("qwen2")), tmp_path / "own.gguf"
    assert main(["imatrix", str(recipe), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "blk.0.attn_q.weight.in_sum2" in read_header(out).tensors
    assert main(["imatrix", str(recipe), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl is a file that this command reads; write to another file" in capsys.readouterr().err


def test_an_encoder_has_no_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, "all-minilm-l6-v2", task="text-classification")
    assert main(["imatrix", str(recipe)]) == 2
    error = json.dumps(capsys.readouterr().err)
    assert "imatrix does not work for task text-classification; use onnx: {weights: int8}" in error
