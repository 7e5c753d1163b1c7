from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_export.adapters.fold import fold_peft
from edgetune_export.adapters.shapes import Prefix
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.base import Source
from edgetune_export.backends.gguf.backend import write_adapter
from edgetune_export.backends.onnx import backend as onnx
from edgetune_runtime.engines.needs import AdapterSize
from edgetune_runtime.formats.gguf_file import read_header
from tiny import FINGERPRINT, make_model

from edgetune import methods
from edgetune.methods import Method, MethodOptions
from edgetune.planning.adapters import size_in_memory


def lora(**options: Any) -> tuple[Method[Any], MethodOptions]:  # noqa: ANN401 - options of the method
    method = methods.load("lora")
    return method, method.options.model_validate(options)


def low_rank_values(base: BaseShape, **options: Any) -> int:  # noqa: ANN401 - options of the method
    method, chosen = lora(**options)
    return method.trained(base, chosen).low_rank_values


def size_of(
    method: Method[Any], options: MethodOptions, shape: str, base: BaseShape, engine: str, dtype: str = "f16"
) -> AdapterSize:
    trained = method.trained(base, options)
    values = {"prefix": method.prefix_tokens(options) * base.kv_values_per_token}
    return size_in_memory(engine, dtype, shape, trained, values)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8},
        {"r": 16, "target_modules": ("q_proj", "v_proj")},
        {"r": 4, "target_modules": ("mlp.gate_proj",)},
        {"r": 4, "rank_pattern": {"down_proj": 20, "layers.1.+": 3}},
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "f16", "q8_0"])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_the_size_of_a_lora_is_that_of_the_written_file(
    arch: str, dtype: str, options: dict[str, Any], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    if arch == "phi3" and "target_modules" in options:
        options = {**options, "target_modules": ("qkv_proj", "gate_up_proj")}
    base, (method, chosen) = tiny_gguf(arch), lora(**options)
    shape = BaseShape.of_header(read_header(base))
    method.save(method.attach(make_model(arch, shape.vocabulary), chosen, 1), tmp_path / "peft")
    out = tmp_path / "adapter.gguf"
    write_adapter(fold_peft(tmp_path / "peft", "a"), base, out, dtype=dtype, base_fingerprint=FINGERPRINT)
    size, written = size_of(method, chosen, "low_rank", shape, "gguf", dtype), read_header(out)
    assert size.modules == len(written.tensors) // 2
    assert size.file_bytes == sum(tensor.nbytes for tensor in written.tensors.values())


@pytest.mark.parametrize("targets", ["all-linear", ("v_proj",), ("q_proj", "v_proj", "up_proj")])
def test_the_size_of_a_lora_in_onnx_counts_what_q_k_and_v_share(
    targets: str | tuple[str, ...], tiny_source: Callable[[str], Source], tmp_path: Path
) -> None:
    source, (method, chosen) = tiny_source("llama"), lora(r=4, target_modules=targets)
    shape = BaseShape.of_header(source.header)
    method.save(method.attach(make_model("llama", shape.vocabulary), chosen, 1), tmp_path / "peft")
    adapter, out = fold_peft(tmp_path / "peft", "a"), tmp_path / "adapter.onnx_adapter"
    graph = onnx.write_base(source, tmp_path / "base", [adapter])
    onnx.write_adapter(adapter, graph, out, base_fingerprint=FINGERPRINT)
    size = size_of(method, chosen, "low_rank", shape, "onnx")
    assert size.file_bytes == 4 * sum(onnx.values_by_type(out).values())


def test_a_single_target_module_may_be_written_as_text(tiny_gguf: Callable[[str], Path]) -> None:
    shape = BaseShape.of_header(read_header(tiny_gguf("llama")))
    text, names = (
        size_of(*lora(target_modules=targets), "low_rank", shape, "gguf") for targets in ("q_proj", ("q_proj",))
    )
    assert text == names
    assert text.modules == 2


def test_modules_still_to_be_chosen_count_as_all_but_the_output_layer(tiny_gguf: Callable[[str], Path]) -> None:
    shape = BaseShape.of_header(read_header(tiny_gguf("llama")))
    auto, every, head, without = (
        low_rank_values(shape, target_modules=targets)
        for targets in ("auto", "all-linear", ("lm_head", "q_proj"), "q_proj")
    )
    assert auto == every
    assert head > without


def test_each_engine_holds_an_adapter_in_its_own_types(tiny_gguf: Callable[[str], Path]) -> None:
    shape = BaseShape.of_header(read_header(tiny_gguf("llama")))
    values = low_rank_values(shape)
    in_gguf, in_onnx = (size_of(*lora(), "low_rank", shape, name) for name in ("gguf", "onnx"))
    assert in_gguf.file_bytes == 2 * values
    # B of q, k and v has the outputs of all three.
    assert 4 * values < in_onnx.file_bytes < 8 * values
    method = methods.load("prefix")
    prefix = method.options.model_validate({"num_virtual_tokens": 5})
    for engine, width in (("gguf", 2), ("onnx", 4)):
        size = size_of(method, prefix, Prefix.shape, shape, engine)
        assert (size.file_bytes, size.modules, size.is_prefix) == (5 * 2 * 2 * 32 * width, 0, True)
