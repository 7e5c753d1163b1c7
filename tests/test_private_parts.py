"""Pins the private parts of other libraries that edgetune uses or patches, so that an upgrade shows what changed.

pyproject.toml caps these libraries. To raise a cap: install the new release, run the tests, and look at each failure.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = ("edgetune", "export/edgetune_export", "runtime/edgetune_runtime")


def names_in(function: Callable[..., Any]) -> tuple[str, ...]:
    """The attributes and globals that a function's code names."""
    return function.__code__.co_names


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("pyproject.toml", "onnx-ir"),
        ("pyproject.toml", "onnxruntime"),
        ("pyproject.toml", "onnxruntime-genai"),
        ("pyproject.toml", "peft"),
        ("pyproject.toml", "transformers"),
        ("runtime/pyproject.toml", "llama-cpp-python"),
        ("runtime/pyproject.toml", "tuf"),
        ("runtime/pyproject.toml", "uvicorn"),
    ],
)
def test_libraries_whose_private_parts_are_used_have_an_upper_cap(file: str, library: str) -> None:
    project = tomllib.loads((ROOT / file).read_text(encoding="utf-8"))
    lines = [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    hooks = project["tool"]["hatch"].get("metadata", {}).get("hooks", {})
    lines += hooks.get("custom", {}).get("dependencies", [])
    (requirement,) = (r for r in map(Requirement, lines) if r.name == library)
    assert any(specifier.operator == "<" for specifier in requirement.specifier)


def test_short_convolutions_call_a_function_of_their_module_that_gets_the_options_of_the_pass() -> None:
    from transformers.models.lfm2 import modeling_lfm2  # noqa: PLC0415 - slow to import

    assert "causal_conv1d_fn" in names_in(inspect.unwrap(modeling_lfm2.Lfm2ShortConv.forward))
    assert parameters_of(modeling_lfm2.causal_conv1d_fn)[:3] == ["hidden_states", "weight", "bias"]


def test_llama_cpp_has_these_flags_of_states() -> None:
    import llama_cpp  # noqa: PLC0415 - an extra
    from edgetune_runtime.engines.gguf import hybrid_cache, kv_cache  # noqa: PLC0415

    assert kv_cache._WHOLE == llama_cpp.LLAMA_STATE_SEQ_FLAGS_NONE
    assert hybrid_cache._RECURRENT == llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


def test_tuf_compares_expiry_with_the_time_that_is_set() -> None:
    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet  # noqa: PLC0415 - an extra
    from tuf.ngclient.updater import Updater  # noqa: PLC0415

    assert "_trusted_set" in names_in(Updater.__init__)
    for check in ("update_timestamp", "_check_final_timestamp", "_check_final_snapshot", "update_delegated_targets"):
        assert "reference_time" in names_in(getattr(TrustedMetadataSet, check))


def test_transformers_checkpoints_a_layer_through_the_attributes_that_are_set() -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415 - slow to import

    class Layer(GradientCheckpointingLayer):  # type: ignore[misc]  # transformers carries no types
        def forward(self, x: torch.Tensor, cache: object = None) -> tuple[torch.Tensor, object]:
            return x + 1, cache

    calls: list[str] = []

    def checkpoint(function: Callable[..., Any], *args: object) -> object:
        calls.append("checkpointed")
        return function(*args)

    layer = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = checkpoint
    layer._can_checkpoint_with_cache = True
    _, cache = layer(torch.zeros(1, requires_grad=True), cache="kept")
    assert (calls, cache) == (["checkpointed"], "kept")
    del layer.gradient_checkpointing, layer._gradient_checkpointing_func, layer._can_checkpoint_with_cache
    layer(torch.zeros(1, requires_grad=True))
    assert len(calls) == 1


def test_transformers_caches_hold_keys_and_values_by_layer() -> None:
    from transformers import DynamicCache, LlamaConfig  # noqa: PLC0415 - slow to import

    states = torch.zeros(1, 1, 3, 4)
    cache = DynamicCache([(states, states + 1)])
    assert torch.equal(cache.layers[0].keys, states)
    assert torch.equal(cache.layers[0].values, states + 1)
    assert parameters_of(DynamicCache.update)[:4] == ["self", "key_states", "value_states", "layer_idx"]
    assert LlamaConfig(attn_implementation="eager")._attn_implementation == "eager"


def test_peft_computes_a_plain_lora_layer_from_the_parts_that_are_fused() -> None:
    from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant  # noqa: PLC0415 - slow to import

    assert {"lora_variant", "lora_dropout", "lora_A", "lora_B", "scaling"} <= set(names_in(Linear.forward))
    assert {"disable_adapters", "merged", "active_adapters", "base_layer"} <= set(names_in(Linear.forward))
    # What takes the place of a variant in training is called like this.
    assert parameters_of(LoraVariant.forward)[:4] == ["module", "active_adapter", "x", "result"]
    assert "lora_variant" in names_in(LoraLayer.update_layer)


def test_peft_has_the_parts_of_each_method_that_are_read() -> None:
    from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator  # noqa: PLC0415 - slow to import
    from peft.tuners.adalora.model import AdaLoraModel  # noqa: PLC0415
    from peft.tuners.ia3.layer import IA3Layer  # noqa: PLC0415
    from peft.tuners.loha.layer import LoHaLayer  # noqa: PLC0415
    from peft.tuners.lokr.layer import LoKrLayer  # noqa: PLC0415
    from peft.tuners.vera.layer import VeraLayer  # noqa: PLC0415

    assert names_in(RankAllocator.reset_ipt) == ("ipt", "exp_avg_ipt", "exp_avg_unc")
    assert parameters_of(AdaLoraModel.update_and_allocate) == ["self", "global_step"]
    assert {"lora_E", "lora_A", "lora_B", "ranknum"} <= set(names_in(AdaLoraLayer.__init__))
    assert {"ia3_l", "is_feedforward"} <= set(names_in(IA3Layer.__init__))
    assert {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= set(LoHaLayer.adapter_layer_names)
    assert {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"} <= set(
        LoKrLayer.adapter_layer_names
    )
    assert {"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"} <= set(names_in(VeraLayer.__init__))


def test_peft_keeps_what_prompt_methods_learn_in_an_encoder_by_name() -> None:
    from peft import PeftModel  # noqa: PLC0415 - slow to import
    from peft.helpers import disable_input_dtype_casting  # noqa: PLC0415
    from peft.tuners.prefix_tuning import PrefixEncoder  # noqa: PLC0415

    assert {"prompt_encoder", "prompt_tokens"} <= set(names_in(PeftModel._setup_prompt_encoder))
    assert parameters_of(PrefixEncoder.load_prompt_embeddings) == ["self", "prompt_embeddings"]
    assert parameters_of(disable_input_dtype_casting) == ["model", "active"]


def test_onnxruntime_asks_the_overridden_method_which_products_to_round() -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415 - slow to import

    assert parameters_of(MatMulNBitsQuantizer._generate_q4_node_config) == ["self"]
    assert "_generate_q4_node_config" in names_in(MatMulNBitsQuantizer.int4_quant_algo)
    assert {"nodes_to_exclude", "algo_config"} <= set(parameters_of(MatMulNBitsQuantizer.__init__))


def test_genai_builder_loads_and_saves_through_the_functions_that_are_patched() -> None:
    spec = find_spec("onnxruntime_genai")
    assert spec is not None
    assert spec.origin is not None
    models = Path(spec.origin).parent / "models"
    builder = ast.parse((models / "builder.py").read_text(encoding="utf-8"))
    assert {"create_model", "parse_extra_options"} <= {getattr(node, "name", "") for node in builder.body}
    base = (models / "builders/base.py").read_text(encoding="utf-8")
    assert {"ir.save", "ir.LazyTensor", "auto_class.from_pretrained"} <= {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(base))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def test_genai_builder_has_the_class_and_the_methods_that_are_replaced_for_gemma_4() -> None:
    from edgetune_export.backends.onnx.gemma4 import _PerLayer  # noqa: PLC0415 - slow to import

    spec = find_spec("onnxruntime_genai.models")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    files = ("builder.py", "builders/base.py", "builders/gemma.py")
    nodes = [node for name in files for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8")))]
    methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {name for name in vars(_PerLayer) if not name.startswith("_")} <= methods
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {"Gemma3Model", "Gemma4Model", "Gemma4MoEModel"} <= imported


def test_a_tensor_that_the_builder_wraps_shows_whether_it_has_values() -> None:
    import onnx_ir as ir  # noqa: PLC0415 - slow to import
    from onnx_ir.tensor_adapters import TorchTensor  # noqa: PLC0415

    absent = TorchTensor(torch.empty(2, 2, device="meta"))
    lazy = ir.LazyTensor(lambda: absent, dtype=absent.dtype, shape=ir.Shape([2, 2]))
    assert absent.raw.is_meta
    assert lazy.raw().raw.is_meta
    assert parameters_of(ir.save)[:2] == ["model", "path"]


def test_torch_tells_whether_the_processor_multiplies_bf16() -> None:
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


@cache
def trees() -> list[ast.AST]:
    """Every module of the packages, parsed."""
    paths = (path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py")))
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def test_llama_cpp_has_every_function_and_constant_that_is_called() -> None:
    import llama_cpp  # noqa: PLC0415 - heavy

    used = {
        node.attr
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"library()", "llama", "llama_cpp"}
        if node.attr.lower().startswith(("llama_", "ggml_"))
    }
    assert len(used) > 40
    assert {name for name in used if not hasattr(llama_cpp, name)} == set()


def test_llama_cpp_parameters_have_the_fields_that_are_set() -> None:
    # ctypes takes an unknown field without a word, and llama.cpp would go on with its default.
    import llama_cpp  # noqa: PLC0415 - heavy

    set_here = {
        node.attr
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id in {"params", "parameters"}
    }
    structures = (llama_cpp.llama_model_params, llama_cpp.llama_context_params, llama_cpp.llama_model_quantize_params)
    fields = {name for structure in structures for name, _ in structure._fields_}
    assert {"load_mode", "use_extra_bufts", "swa_full", "flash_attn_type", "allow_requantize"} <= set_here <= fields


def test_llama_cpp_functions_take_the_arguments_that_are_given() -> None:
    import llama_cpp  # noqa: PLC0415 - heavy

    arguments = {
        "llama_set_adapters_lora": 4,
        "llama_state_seq_get_data": 4,
        "llama_state_seq_set_data": 4,
        "llama_memory_seq_cp": 5,
        "llama_model_init_from_user": 4,
        "llama_memory_seq_rm": 4,
        "llama_set_abort_callback": 3,
        "llama_token_to_piece": 6,
        "llama_tokenize": 7,
    }
    for name, count in arguments.items():
        assert len(getattr(llama_cpp, name).argtypes) == count, name
    fields = [name for name, _ in llama_cpp.llama_batch._fields_]
    assert fields == ["n_tokens", "token", "embd", "pos", "n_seq_id", "seq_id", "logits"]


def test_the_ggml_library_beside_llama_cpp_converts_rows() -> None:
    import llama_cpp  # noqa: PLC0415 - heavy

    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    functions = (
        "ggml_quantize_chunk",
        "ggml_quantize_requires_imatrix",
        "dequantize_row_q4_0",
        "ggml_fp16_to_fp32_row",
    )
    assert [name for name in functions if not hasattr(ggml, name)] == []


def test_uvicorn_has_the_parts_of_its_server_and_of_its_h11_protocol_that_are_overridden() -> None:
    import uvicorn  # noqa: PLC0415 - only the runtime's server needs it
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle  # noqa: PLC0415

    assert {"loop", "transport", "cycle"} <= {*names_in(H11Protocol.__init__)}
    assert parameters_of(H11Protocol.connection_made) == ["self", "transport"]
    assert parameters_of(H11Protocol.data_received) == ["self", "data"]
    assert parameters_of(H11Protocol.connection_lost) == ["self", "exc"]
    assert parameters_of(H11Protocol._unsupported_upgrade_warning) == ["self"]
    assert parameters_of(H11Protocol.pause_writing) == parameters_of(H11Protocol.resume_writing) == ["self"]
    assert "response_complete" in names_in(RequestResponseCycle.__init__)
    assert parameters_of(uvicorn.Server.startup) == ["self", "sockets"]
    assert parameters_of(uvicorn.Server.capture_signals) == ["self"]
    # The loop ends once this is set, and the connections are closed.
    assert "should_exit" in names_in(uvicorn.Server.on_tick)
