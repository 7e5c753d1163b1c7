from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai as og
import pytest
import torch
from edgetune_devices.needs import needs_of_header
from edgetune_export.adapters.fold import fold_peft, merge
from edgetune_export.adapters.shapes import Delta, LowRank
from edgetune_export.architectures import known
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.base import Source
from edgetune_export.backends.onnx import FORMAT
from edgetune_export.backends.onnx.backend import values_by_type, weight_type, write_adapter, write_base, write_merged
from edgetune_export.backends.onnx.graph import load_structure
from edgetune_export.backends.onnx.options import OnnxOptions
from edgetune_export.backends.onnx.slots import fill, slots_of
from edgetune_export.backends.onnx.structure import run_builder
from edgetune_export.base_file.quantize import quantize_gguf
from edgetune_export.parity import compare
from edgetune_runtime.bundle import sha256_of
from edgetune_runtime.engines.onnx.engine import OnnxEngine
from edgetune_runtime.engines.onnx.needs import angle_bytes, per_layer_embedding
from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from edgetune_runtime.formats.gguf_sizes import data_start
from edgetune_runtime.formats.onnx_file import read_onnx
from genai import greedy, greedy_in_genai
from onnx import numpy_helper
from pydantic import ValidationError
from runtime.gguf_files import scaled
from tiny import ARCHITECTURES, FEW
from transformers import AutoModelForCausalLM
from weights import weights_in

from edgetune.bases import Base, load_torch
from edgetune.shipping.verify import logits_of

KINDS = ["plain", "rslora", "patterns", "q and v"]
CLOSE = 1e-4
AUTO, FP32 = OnnxOptions(), OnnxOptions(weights="fp32")
Made = Callable[..., Path]
Sources = Callable[..., Source]


@pytest.fixture(scope="module")
def source_of(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """`source_of(arch, held)`: the base with its matrices in another ggml type, and torch's weights of that file."""
    folder = tmp_path_factory.mktemp("held")

    @cache
    def make(arch: str, held: str = "f16") -> Source:
        source = tiny_source(arch)
        if held == "f16":
            return source
        path = folder / f"{arch}-{held}.gguf"
        quantize_gguf(source.path, path, held)
        base = Base(arch, path, sha256_of(path), read_header(path))
        return replace(source, path=path, fingerprint=base.fingerprint, model=load_torch(base, torch.float32))

    return make


@pytest.fixture(scope="module")
def made(source_of: Sources, tune: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(arch, kind, held, options, rows)`: the graph with slots for an adapter of that kind, or none.

    `rows` are for calibration.
    """

    @cache
    def make(
        arch: str,
        kind: str | None = "plain",
        held: str = "f16",
        options: OnnxOptions = AUTO,
        rows: tuple[tuple[int, ...], ...] = (),
    ) -> Path:
        source = replace(source_of(arch, held), options={"onnx": options}, calibration=rows)
        adapters = [fold_peft(tune(arch, kind).folder, "any")] if kind else []
        return write_base(source, tmp_path_factory.mktemp("made"), adapters)

    return make


def decoded(engine: OnnxEngine, tokens: list[int], adapters: dict[str, float] | None = None) -> np.ndarray:
    engine.activate(adapters or {})
    engine.truncate(0)
    logits: np.ndarray = engine.decode_all(tokens)
    return logits


def matrices(path: Path) -> dict[str, np.ndarray]:
    """What the graph's products and its embedding multiply with, [rows, columns], read without any of our code."""
    model = onnx.load(path)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            data, scales, levels = values[node.input[1]], values[node.input[2]], attributes["bits"]
            assert (len(node.input), attributes["accuracy_level"]) == (3, 4)
        elif node.op_type == "GatherBlockQuantized":
            data, scales, levels = values[node.input[0]], values[node.input[2]], attributes["bits"]
        else:
            continue
        assert attributes["block_size"] == 32
        data = data.reshape(len(data), -1)
        halves = [data & 15, data >> 4] if levels == 4 else [data]
        centred = np.stack(halves, -1).reshape(*scales.shape, 32).astype(np.float32) - 2 ** (levels - 1)
        found[node.name] = (centred * scales[..., None]).reshape(len(data), -1)
    return found


@pytest.mark.parametrize("held", ["q4_0", "q8_0"])
def test_a_graph_holds_the_numbers_of_the_gguf_bit_for_bit(held: str, made: Made, source_of: Sources) -> None:
    # The numbers of the model in torch are compared with those of transformers' own reader in test_bases.py.
    weights = {name: tensor.numpy() for name, tensor in source_of("llama", held).model.state_dict().items()}
    found = matrices(made("llama", "plain", held))
    layers = range(2)
    expected = {"/model/embed_tokens/Gather": ["model.embed_tokens"], "/lm_head/MatMul": ["lm_head"]}
    for layer in layers:
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        node = f"/model/layers.{layer}"
        expected[f"{node}/attn/qkv_proj/MatMul"] = [f"{attention}.{which}_proj" for which in "qkv"]
        expected[f"{node}/attn/o_proj/MatMul"] = [f"{attention}.o_proj"]
        expected[f"{node}/mlp/gate_up_proj/MatMul"] = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        expected[f"{node}/mlp/down_proj/MatMul"] = [f"{mlp}.down_proj"]
    assert found.keys() == expected.keys()
    for node, modules in expected.items():
        whole = np.concatenate([weights[f"{module}.weight"] for module in modules])
        assert found[node].tobytes() == whole.tobytes(), node


@pytest.mark.parametrize("held", ["q4_0", "q8_0", "q4_1", "q5_0", "q6_k"])
def test_a_quantized_graph_is_close_to_torch_on_the_same_weights(
    held: str, made: Made, source_of: Sources, open_engine: Callable[..., Any], rows: list[list[int]]
) -> None:
    # The rest is the rounding of activations to 8 bits, which accuracy_level 4 asks for.
    model = source_of("llama", held).model
    assert compare(logits_of(model), open_engine(made("llama", "plain", held)), rows).kl < 1e-3


@pytest.mark.parametrize("held", ["f16", "q4_0"])
def test_the_checker_of_onnx_passes(held: str, made: Made) -> None:
    onnx.checker.check_model(made("llama", "plain", held))


def test_a_graph_names_no_commit_of_a_repository_around_the_environment(made: Made) -> None:
    model = onnx.load(made("llama", "plain", "f16"), load_external_data=False)
    assert model.producer_version == version("onnxruntime-genai")


@pytest.mark.parametrize("options", [AUTO, FP32])
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if "onnx" not in known()[arch].refusals])
def test_a_float_graph_computes_what_torch_computes(
    arch: str,
    options: OnnxOptions,
    made: Made,
    source_of: Sources,
    open_engine: Callable[..., Any],
    rows: list[list[int]],
) -> None:
    engine = open_engine(made(arch, "plain", "f16", options))
    for row in rows:
        np.testing.assert_allclose(decoded(engine, row), logits_of(source_of(arch).model)(row), atol=CLOSE)


def test_a_float_graph_of_a_quantized_base_computes_what_torch_computes(
    made: Made, source_of: Sources, open_engine: Callable[..., Any], rows: list[list[int]]
) -> None:
    engine = open_engine(made("llama", "plain", "q4_0", FP32))
    assert not matrices(made("llama", "plain", "q4_0", FP32))
    expected = logits_of(source_of("llama", "q4_0").model)(rows[0])
    np.testing.assert_allclose(decoded(engine, rows[0]), expected, atol=CLOSE)


@pytest.mark.parametrize(
    ("arch", "factors"), [("llama", np.geomspace(1, 8, 8, dtype=np.float32)), ("mistral", None), ("gemma3", None)]
)
def test_a_graph_rotates_as_torch_where_the_base_scales_it(
    arch: str,
    factors: np.ndarray | None,
    source_of: Sources,
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    path = scaled(source_of(arch).path, tmp_path / "scaled.gguf", factors)
    model = load_torch(Base(arch, path, "", read_header(path)), torch.float32)
    graph = write_base(Source(path, sha256_of(path), model, tmp_path), tmp_path, ())
    np.testing.assert_allclose(decoded(open_engine(graph), rows[0]), logits_of(model)(rows[0]), atol=CLOSE)


@pytest.mark.parametrize(("arch", "kept"), [("gemma3", 128**0.5), ("llama", 11.31)])
def test_embeddings_are_scaled_by_the_root_of_their_width_where_the_builder_rounds_it(
    arch: str, kept: float, tmp_path: Path
) -> None:
    base = GgufHeader({"general.architecture": arch, f"{arch}.embedding_length": 128}, {})
    values = {"table": np.ones((7, 128), np.float32), "scale": np.array(11.31, np.float32)}
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["rows"], name="/model/embed_tokens/Gather"),
        onnx.helper.make_node("Mul", ["rows", "scale"], ["scaled"], name="/model/embed_tokens/Mul"),
    ]
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1])
    scaled = onnx.helper.make_tensor_value_info("scaled", onnx.TensorProto.FLOAT, [1, 128])
    tensors = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = onnx.helper.make_graph(nodes, "main", [ids], [scaled], tensors)
    opsets = [onnx.helper.make_opsetid("", 22)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    model = ir.to_proto(load_structure(tmp_path, base)).SerializeToString()
    rows = onnxruntime.InferenceSession(model).run(None, {"ids": np.array([3])})[0]
    assert rows[0, 0] == np.float32(kept)


@pytest.mark.parametrize("held", ["f16", "q4_0"])
def test_empty_slots_change_no_bit(
    held: str, made: Made, open_engine: Callable[..., Any], rows: list[list[int]]
) -> None:
    with_slots, without = (decoded(open_engine(made("llama", kind, held)), rows[0]) for kind in ("plain", None))
    assert slots_of(read_onnx(made("llama", None, held)).metadata) == {}
    assert np.array_equal(with_slots, without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", FEW)
def test_an_exported_adapter_computes_what_it_does_in_peft(
    arch: str,
    kind: str,
    made: Made,
    tune: Callable[..., Any],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    tuned, base = tune(arch, kind), made(arch)
    write_adapter(fold_peft(tuned.folder, "command"), base, tmp_path / "a.onnx_adapter", base_fingerprint="0" * 64)
    engine = open_engine(base, tmp_path / "a.onnx_adapter")
    for row in rows:
        expected = tuned.adapted(row)
        assert np.abs(expected - tuned.plain(row)).max() > 0.5
        np.testing.assert_allclose(decoded(engine, row, {"adapter": 1.0}), expected, atol=CLOSE)
        np.testing.assert_allclose(decoded(engine, row), tuned.plain(row), atol=CLOSE)


def test_modules_that_no_adapter_targets_get_no_slot(made: Made, tune: Callable[..., Any], tmp_path: Path) -> None:
    base = made("llama", "q and v")
    slots = slots_of(read_onnx(base).metadata)
    assert list(slots) == [f"model.layers.{layer}.attn.qkv_proj" for layer in (0, 1)]
    given = {value.name for value in onnxruntime.InferenceSession(str(base)).get_overridable_initializers()}
    expected = {f"{slot}.lora_{side}.weight" for slot in slots for side in "AB"}
    assert given == {*expected, "logits_start"}
    folded = fold_peft(tune("llama", "plain").folder, "command")
    with pytest.raises(IncompatibleError, match=r"'command' does not fit.*no slot for model\.layers\.0\.mlp") as caught:
        write_adapter(folded, base, tmp_path / "adapter", base_fingerprint="0" * 64)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_ranks_of_one_adapter_may_differ_in_every_slot(made: Made, tune: Callable[..., Any]) -> None:
    header = read_onnx(made("llama"))
    tensors = fill(fold_peft(tune("llama", "patterns").folder, "command"), header)
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if ".lora_B." in name}
    # q has rank 4, k and v 8; gate has 8, up has 12 in the second layer.
    assert ranks["model.layers.0.attn.qkv_proj.lora_B.weight"] == 20
    assert ranks["model.layers.0.mlp.gate_proj.lora_B.weight"] == 8
    assert ranks["model.layers.1.mlp.up_proj.lora_B.weight"] == 12
    assert ranks["model.layers.1.mlp.down_proj.lora_B.weight"] == 8


def test_two_adapters_with_scales_are_their_concatenation(
    made: Made, tune: Callable[..., Any], open_engine: Callable[..., Any], rows: list[list[int]], tmp_path: Path
) -> None:
    base, scales = made("llama"), {"first": 0.5, "second": -1.5}
    kinds = {"first": "q and v", "second": "patterns"}
    folded = {name: fold_peft(tune("llama", kind, 7).folder, name).modules for name, kind in kinds.items()}
    joined = {}
    for module in folded["second"]:
        parts = [(folded[name][module], scale) for name, scale in scales.items() if module in folded[name]]
        b = np.concatenate([part.b * np.float32(scale) for part, scale in parts], axis=1)
        joined[module] = Delta(np.concatenate([part.a for part, _ in parts]), b)
    engine = open_engine(base)
    for name, modules in {**folded, "joined": joined}.items():
        write_adapter(LowRank(name, "lora", modules), base, tmp_path / name, base_fingerprint="0" * 64)
        engine.load_adapter(name, tmp_path / name)
    both = decoded(engine, rows[0], scales)
    np.testing.assert_allclose(both, decoded(engine, rows[0], {"joined": 1.0}), atol=CLOSE)
    np.testing.assert_allclose(both, decoded(engine, rows[0], dict(reversed(scales.items()))), atol=CLOSE)
    assert np.abs(both - decoded(engine, rows[0])).max() > 0.5


@pytest.mark.parametrize("arch", ["llama", "gemma4"])
def test_a_merged_model_answers_as_the_adapter(
    arch: str,
    source_of: Sources,
    tune: Callable[..., Any],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
) -> None:
    tuned, out = tune(arch), tmp_path / "onnx/model.onnx"
    source = source_of(arch)
    write_merged(merge(fold_peft(tuned.folder, "command"), weights_in(source.path)), source, out)
    assert not list(source.work.glob("*.gguf"))
    engine = open_engine(out)
    assert compare(tuned.adapted, engine, rows).kl < 1e-5
    assert compare(tuned.plain, engine, rows).kl > 0.05


def test_an_adapter_in_f16_has_half_the_size_and_nearly_the_same_logits(
    made: Made, tune: Callable[..., Any], open_engine: Callable[..., Any], rows: list[list[int]], tmp_path: Path
) -> None:
    tuned, base = tune("llama"), made("llama")
    folded = fold_peft(tuned.folder, "command")
    for dtype in ("f32", "f16"):
        write_adapter(folded, base, tmp_path / dtype, dtype=dtype, base_fingerprint="0" * 64)
    small, large = ((tmp_path / dtype).stat().st_size for dtype in ("f16", "f32"))
    assert small < 0.6 * large
    assert compare(tuned.adapted, open_engine(base, tmp_path / "f16"), rows).kl < 1e-5


def test_values_beyond_f16_need_f32(made: Made, tmp_path: Path) -> None:
    large = Delta(np.ones((2, 64), np.float32), np.full((64, 2), 7e4, np.float32))
    adapter = LowRank("command", "lora", {"model.layers.0.self_attn.q_proj": large})
    with pytest.raises(VerificationError, match=r"qkv_proj.* reaches 7e\+04, .*; write it with onnx_dtype: f32"):
        write_adapter(adapter, made("llama"), tmp_path / "out", dtype="f16", base_fingerprint="0" * 64)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def first_rows() -> Iterator[np.ndarray]:
    yield np.random.default_rng(3).integers(5, 380, (1, 20))


# Of a Gemma 4, the last layers compute only these.
@pytest.mark.parametrize("arch", ["llama", "gemma4"])
def test_logits_start_leaves_out_the_rows_before_it(arch: str, made: Made, first_rows: np.ndarray) -> None:
    session = onnxruntime.InferenceSession(str(made(arch)))
    feeds = {"input_ids": first_rows, "attention_mask": np.ones_like(first_rows)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            size = value.shape[3] if isinstance(value.shape[3], int) else 16
            feeds[value.name] = np.zeros((1, 2, 0, size), np.float32)
    whole = session.run(["logits"], feeds)[0]
    assert whole.shape[1] == 20
    for start in (0, 5, 19):
        part = session.run(["logits"], {**feeds, "logits_start": np.array([start])})[0]
        np.testing.assert_allclose(part, whole[:, start:], atol=1e-5)


# The other kinds name modules that bases with recurrent layers do not have in each layer.
@pytest.mark.parametrize(
    ("arch", "kinds"), [*((arch, KINDS) for arch in FEW), *((arch, KINDS[:2]) for arch in ("gemma4", "lfm2", "qwen35"))]
)
def test_onnxruntime_genai_gives_the_same_texts_on_the_same_folder(
    arch: str, kinds: list[str], made: Made, tune: Callable[..., Any], open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    base = made(arch)
    engine, model = open_engine(base), og.Model(str(base.parent))
    adapters, tokenizer = og.Adapters(model), og.Tokenizer(model)
    for kind in kinds:
        path = tmp_path / kind.replace(" ", "-")
        write_adapter(fold_peft(tune(arch, kind).folder, kind), base, path, base_fingerprint="0" * 64)
        engine.load_adapter(kind, path)
        adapters.load(str(path), kind)
    prompt = engine.tokenizer.tokenize("<|im_start|>user\nturn on the warm light in the kitchen<|im_end|>\n")
    # It does not add the token that begins each text of a Gemma 4.
    begin = 1 if arch == "gemma4" else 0
    assert tokenizer.encode("turn on the lamp").tolist() == engine.tokenizer.tokenize("turn on the lamp")[begin:]

    texts = set()
    for kind in (None, *kinds, None):
        ours = greedy(engine, prompt, {kind: 1.0} if kind else {}, 12)
        assert greedy_in_genai(model, adapters, prompt, kind, 12) == ours, kind
        texts.add(tuple(ours))
    assert len(texts) == 1 + len(kinds)


INT4_KL = 0.05
"""Bound of the mean KL between a random base and its 4-bit graph: 0.007 to 0.013 were seen, and 0.03 with LFM2."""


@pytest.mark.parametrize(
    ("method", "arch", "products"),
    [
        *((method, "llama", 8) for method in ("rtn", "k_quant", "gptq")),
        ("gptq", "lfm2", 12),
        ("rtn", "gemma4", 37),
    ],
)
def test_each_method_gives_a_4_bit_graph_that_is_near_torch(
    method: str,
    arch: str,
    products: int,
    made: Made,
    source_of: Sources,
    tune: Callable[..., Any],
    open_engine: Callable[..., Any],
    rows: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(1)
    calibration = tuple(tuple(random.integers(5, 380, 48).tolist()) for _ in range(8)) if method == "gptq" else ()
    base = made(arch, "plain", "f16", OnnxOptions(weights="int4", method=method), calibration)
    assert capsys.readouterr().out == ""
    onnx.checker.check_model(base)
    bits = [a.i for node in onnx.load(base).graph.node for a in node.attribute if a.name == "bits"]
    embeddings = 1 + len(known()[arch].embeddings_in_file)
    assert sorted(bits) == [4] * products + [8] * (embeddings + 1)
    counted = values_by_type(base)
    # The embedding and the output layer stay at 8 bits and are one tensor here; f32 are norms and rotary tables.
    matrices = sum(p.numel() for p in source_of(arch).model.parameters() if p.dim() == 2)
    matrices += BaseShape.of_header(read_header(source_of(arch).path)).parameters_in_file
    assert counted["int4"] + counted["int8"] == matrices
    assert set(counted) == {"int4", "int8", "f32"}
    engine, model = open_engine(base), source_of(arch).model
    plain = compare(logits_of(model), engine, rows)
    assert 1e-3 < plain.kl < INT4_KL
    tuned = tune(arch)
    write_adapter(fold_peft(tuned.folder, "command"), base, tmp_path / "a", base_fingerprint="0" * 64)
    engine.load_adapter("command", tmp_path / "a")
    engine.activate({"command": 1.0})
    assert compare(tuned.adapted, engine, rows).kl < INT4_KL


@pytest.mark.parametrize("held", ["f16", "q4_0"])
def test_an_embedding_of_which_only_rows_are_read_has_the_planned_size(
    held: str, made: Made, source_of: Sources
) -> None:
    planned = needs_of_header(
        read_header(source_of("gemma4").path), context_length=128, quantization=held, engine="onnx"
    )
    shape = BaseShape.of_header(read_header(source_of("gemma4", held).path))
    found = per_layer_embedding(read_onnx(made("gemma4", "plain", held)))
    assert found == (planned.per_layer_bytes, shape.parameters_in_file)


@pytest.mark.parametrize(
    ("arch", "held", "weights"),
    [("llama", "f16", "auto"), ("llama", "f16", "fp32"), ("qwen2", "f16", "auto"), ("llama", "q8_0", "auto")],
)
def test_weights_have_the_planned_size(arch: str, held: str, weights: str, made: Made, source_of: Sources) -> None:
    header, options = read_header(source_of(arch, held).path), OnnxOptions(weights=weights)
    needs = needs_of_header(header, context_length=128, engine="onnx")
    planned = FORMAT.base_bytes(needs.base_bytes, header.parameters, {"onnx": options}) - data_start(header)
    written = made(arch, None, held, options).with_suffix(".onnx.data").stat().st_size
    # Space between the tensors adds to the file of a tiny base.
    assert planned == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gemma4", "lfm2", "qwen35"])
def test_tables_of_angles_have_the_planned_size(arch: str, made: Made, source_of: Sources) -> None:
    planned = needs_of_header(read_header(source_of(arch).path), context_length=128, engine="onnx")
    assert angle_bytes(read_onnx(made(arch))) == planned.angle_bytes > 0


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValidationError, match="'rtn', 'k_quant' or 'gptq'"):
        OnnxOptions(weights="int4", method="awq")


@pytest.mark.parametrize(
    ("held", "weights", "said"),
    [
        ("f16", "auto", "f32"),
        ("f16", "int8", "q8_0"),
        ("f16", "int4", "int4"),
        ("q4_0", "auto", "q4_0"),
        ("q4_0", "int4", "q4_0"),
        ("q4_0", "fp32", "f32"),
        ("q4_1", "auto", "q4_1"),
    ],
)
def test_the_weight_type_names_how_the_weights_are_rounded(
    held: str, weights: str, said: str, source_of: Sources
) -> None:
    assert weight_type(replace(source_of("llama", held), options={"onnx": OnnxOptions(weights=weights)})) == said


def test_int8_of_a_float_base_is_near_torch(
    made: Made, source_of: Sources, open_engine: Callable[..., Any], rows: list[list[int]]
) -> None:
    base, model = made("llama", "plain", "f16", OnnxOptions(weights="int8")), source_of("llama").model
    assert len(matrices(base)) == 10
    assert compare(logits_of(model), open_engine(base), rows).kl < 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96)])
def test_an_adapter_of_another_size_is_refused_by_name(rows: int, columns: int, made: Made, tmp_path: Path) -> None:
    odd = Delta(np.ones((2, columns), np.float32), np.ones((rows, 2), np.float32))
    adapter = LowRank("command", "lora", {"model.layers.0.self_attn.q_proj": odd})
    with pytest.raises(IncompatibleError, match=f"q_proj is {rows}x{columns} in the adapter, 64x64 in the base"):
        write_adapter(adapter, made("llama"), tmp_path / "out", base_fingerprint="0" * 64)
    assert not list(tmp_path.iterdir())


def test_the_builder_changes_nothing_in_this_process(
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    own = ModuleType("builders")
    monkeypatch.setitem(sys.modules, "builders", own)
    path, handlers = [*sys.path], [*logging.getLogger().handlers]
    patched = ir.save, vars(AutoModelForCausalLM)["from_pretrained"]
    for name in ("first", "second"):
        run_builder(tiny_folder("llama"), tmp_path / name)
    assert sys.modules["builders"] is own
    assert not {"builder", "builders.base", "quantization"} & sys.modules.keys()
    assert (sys.path, logging.getLogger().handlers) == (path, handlers)
    assert (ir.save, vars(AutoModelForCausalLM)["from_pretrained"]) == patched
    assert capfd.readouterr() == ("", "")
    first, second = ((tmp_path / name / "model.onnx").read_bytes() for name in ("first", "second"))
    assert first == second


def test_an_architecture_that_the_builder_lacks_is_refused_in_one_line(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder("llama") / name).read_bytes())
    with pytest.raises(IncompatibleError, match=r"cannot export odd: .*build for gguf") as caught:
        run_builder(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
