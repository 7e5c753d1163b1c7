from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgetune_export import architectures
from edgetune_export.architectures.layout import name_map
from edgetune_export.architectures.shape import linear_modules
from edgetune_export.base_file.convert import convert_folder
from edgetune_export.hf_folder import CONFIG_NAME, read_config
from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.gguf_file import GgufHeader, read_header
from tiny import ARCHITECTURES

from edgetune.bases.folder_header import predict_header


def header_of(name: str) -> GgufHeader:
    return GgufHeader({"general.architecture": name}, {})


def test_every_architecture_is_tested() -> None:
    assert sorted(ARCHITECTURES) == list(architectures.names())


@pytest.mark.parametrize("name", architectures.names())
def test_an_architecture_is_found_by_its_names(name: str) -> None:
    known = architectures.known()[name]
    # What GGUF calls by the name of another is loaded as that other.
    assert architectures.of(header_of(known.gguf)) is architectures.known()[known.gguf.replace("-", "_")]
    assert [architectures.of_model_type(model_type) for model_type in known.model_types] == [known]


@pytest.mark.parametrize("name", ["bloom", "mistral", "base"])
def test_the_error_about_another_architecture_lists_the_supported_ones(name: str) -> None:
    message = rf"architecture '{name}' of base 'x' is not supported; .*: {', '.join(architectures.names())}"
    with pytest.raises(IncompatibleError, match=message):
        architectures.of(header_of(name), "x")
    with pytest.raises(IncompatibleError, match="architecture 'gpt2' is not supported"):
        architectures.of_model_type("gpt2")


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [("olmo2", 16, "bases of architecture 'olmo2': "), ("llama", 20, "bases with heads of 20 values, only multiples")],
)
def test_a_format_that_cannot_hold_a_base_is_refused(name: str, size: int, told: str) -> None:
    sizes = {"embedding_length": 32, "attention.head_count": 2, "attention.key_length": size}
    header = GgufHeader({"general.architecture": name, **{f"{name}.{key}": value for key, value in sizes.items()}}, {})
    architectures.of(header).check_header(header, ["gguf"])
    with pytest.raises(IncompatibleError, match=f"onnx does not support {told}.*; leave out onnx"):
        architectures.of(header).check_header(header, ["gguf", "onnx"])


def test_gemma3_attends_to_windows_in_torch_where_the_runtime_says_so() -> None:
    sizes = {"block_count": 7, "embedding_length": 32, "attention.head_count": 2, "attention.key_length": 16}
    metadata = {"general.architecture": "gemma3", **{f"gemma3.{key}": value for key, value in sizes.items()}}

    def whole_layers(**more: object) -> list[int]:
        own = {f"gemma3.attention.{key}": value for key, value in more.items()}
        header = GgufHeader({**metadata, **own}, {})
        kinds = architectures.of(header).config_entries(header)["layer_types"]
        return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]

    assert whole_layers(sliding_window=16) == [5]
    assert whole_layers(sliding_window=16, sliding_window_pattern=3) == [2, 5]
    assert whole_layers() == list(range(7))


def test_a_granite_without_rotary_embedding_is_refused() -> None:
    header = GgufHeader({"general.architecture": "granite", "granite.rope.scaling.finetuned": False}, {})
    with pytest.raises(IncompatibleError, match="a Granite without rotary embedding"):
        architectures.of(header).whole_config(header)


@pytest.mark.parametrize(
    "changes", [{"layer_types": ["conv"]}, {"layer_types": ["conv", "moe"]}, {"conv_bias": True}, {"sliding_window": 8}]
)
def test_an_lfm2_that_llama_cpp_would_compute_in_another_way_is_refused(changes: dict[str, object]) -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    architectures.known()["lfm2"].check_config(config)
    with pytest.raises(IncompatibleError, match=r"use an LFM2 or LFM2\.5 of text"):
        architectures.known()["lfm2"].check_config(config | changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"enable_moe_block": True}, "the base has experts"),
        ({"attention_k_eq_v": True}, "layers whose values are their keys"),
        ({"num_kv_shared_layers": 2}, "with one of each before the 2 that share"),
        ({"layer_types": ["full_attention"]}, "layer_types .*, not sliding_attention or full_attention for each"),
        ({"rope_parameters": {}}, "the base has rope_parameters '{}'"),
        ({"vocab_size_per_layer_input": 8}, "the base has vocab_size_per_layer_input '8'"),
    ],
)
def test_a_gemma4_that_llama_cpp_would_compute_in_another_way_is_refused(changes: dict[str, Any], told: str) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {"num_hidden_layers": 3, "layer_types": kinds, "num_kv_shared_layers": 1, "vocab_size": 9}
    architectures.known()["gemma4"].check_config(config)
    with pytest.raises(IncompatibleError, match=f"{told}.*; use the text part of a Gemma 4 E2B or E4B"):
        architectures.known()["gemma4"].check_config(config | changes)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("mistral", "hidden_act", "gelu"),
        ("qwen2", "use_sliding_window", True),
        ("phi3", "hidden_act", "relu"),
        ("gemma3", "hidden_activation", "silu"),
        ("gemma3", "query_pre_attn_scalar", 256),
        ("gemma3", "layer_types", ["sliding_attention"] * 6),
    ],
)
def test_a_setting_that_llama_cpp_does_not_read_is_refused(
    name: str, setting: str, value: object, tiny_folder: Callable[[str], Path]
) -> None:
    config, known = read_config(tiny_folder(name)), architectures.known()[name]
    known.check_config(config)
    with pytest.raises(IncompatibleError, match=f"the base has {setting} .* is not supported for .*; use a base with"):
        known.check_config({**config, setting: value})


@pytest.mark.parametrize(("layers", "width", "scalar"), [(26, 1152, 256), (62, 5376, 168)])
def test_the_scale_of_queries_of_a_gemma3_of_27b_is_another(layers: int, width: int, scalar: int) -> None:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 32, "sliding_window": 512}
    architectures.known()["gemma3"].check_config({**sizes, "query_pre_attn_scalar": scalar})


def test_the_context_of_a_mistral_ends_with_its_window(
    tiny_folder: Callable[[str], Path], tmp_path: Path, forked_converter: None
) -> None:
    folder = shutil.copytree(tiny_folder("mistral"), tmp_path / "windowed")
    config = {**read_config(folder), "sliding_window": 128}
    (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    convert_folder(folder, tmp_path / "windowed.gguf")
    for header in (predict_header(folder), read_header(tmp_path / "windowed.gguf")):
        assert header.metadata["llama.context_length"] == 128


@pytest.mark.parametrize("name", architectures.names())
def test_linear_modules_have_the_tensors_that_llama_cpps_converter_gives_them(name: str) -> None:
    known = architectures.known()[name]
    names = name_map(GgufHeader({"general.architecture": known.gguf, f"{known.gguf}.block_count": 1}, {}))
    for module in known.linear_modules:
        assert names.get_name(f"model.layers.0.{module.name}") == f"blk.0.{module.tensor}"


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "token_embd.weight"])
def test_a_base_without_a_matrix_of_its_architecture_is_refused(tensor: str, tiny_gguf: Callable[[str], Path]) -> None:
    header = read_header(tiny_gguf("llama"))
    left = {name: info for name, info in header.tensors.items() if name != tensor}
    flat = {**header.tensors, tensor: replace(header.tensors[tensor], shape=(64,))}
    for tensors in (left, flat):
        with pytest.raises(IncompatibleError, match=f"the base has no matrix {tensor}; use a base that"):
            linear_modules(replace(header, tensors=tensors))
