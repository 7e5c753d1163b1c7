from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgetune_export import backends
from edgetune_export.adapters.fold import fold_peft
from edgetune_export.adapters.shapes import Prefix
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.gguf.backend import write_adapter
from edgetune_runtime.formats.gguf_file import read_header
from tiny import FINGERPRINT, make_model

from edgetune import methods
from edgetune.adapter_sizes import shipped_values, size_in_memory
from edgetune.recipe.parts import MethodSpec


def lora(**options: Any) -> MethodSpec:  # noqa: ANN401 - options of the method
    return MethodSpec.model_validate({"name": "lora", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8},
        {"r": 16, "target_modules": ("q_proj", "v_proj")},
        {"r": 4, "target_modules": ("mlp.gate_proj",)},
        {"r": 4, "rank_pattern": {"down_proj": 2, "layers.1.+": 3}},
    ],
)
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_the_size_of_a_lora_is_that_of_the_written_file(
    arch: str, options: dict[str, Any], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    if arch == "phi3" and "target_modules" in options:
        options = {**options, "target_modules": ("qkv_proj", "gate_up_proj")}
    base, spec = tiny_gguf(arch), lora(**options)
    shape = BaseShape.of_header(read_header(base))
    method = methods.load("lora")
    method.save(method.attach(make_model(arch, shape.vocabulary), spec.options, 1), tmp_path / "peft")
    out = tmp_path / "adapter.gguf"
    write_adapter(fold_peft(tmp_path / "peft", "a"), base, out, dtype="f16", base_fingerprint=FINGERPRINT)
    size, written = size_in_memory(spec, "low_rank", shape, "gguf", dtype="f16"), read_header(out)
    assert size is not None
    assert size.modules == len(written.tensors) // 2
    assert size.file_bytes == sum(tensor.nbytes for tensor in written.tensors.values())


def test_a_single_target_module_may_be_written_as_text(tiny_gguf: Callable[[str], Path]) -> None:
    shape = BaseShape.of_header(read_header(tiny_gguf("llama")))
    text, names = (
        size_in_memory(lora(target_modules=targets), "low_rank", shape, "gguf", dtype="f16")
        for targets in ("q_proj", ("q_proj",))
    )
    assert text == names and text is not None
    assert text.modules == 2


def test_modules_still_to_be_chosen_count_as_all_but_the_output_layer(tiny_gguf: Callable[[str], Path]) -> None:
    shape = BaseShape.of_header(read_header(tiny_gguf("llama")))
    auto, every = (lora(target_modules=targets) for targets in ("auto", "all-linear"))
    assert shipped_values(auto, "low_rank", shape) == shipped_values(every, "low_rank", shape)
    with_head = lora(target_modules=("lm_head", "q_proj"))
    assert shipped_values(with_head, "low_rank", shape) > shipped_values(
        lora(target_modules="q_proj"), "low_rank", shape
    )


def test_each_engine_holds_an_adapter_in_its_own_types(tiny_gguf: Callable[[str], Path]) -> None:
    shape = BaseShape.of_header(read_header(tiny_gguf("llama")))
    values = shipped_values(lora(), "low_rank", shape)
    in_gguf, in_onnx = (size_in_memory(lora(), "low_rank", shape, name, dtype="f16") for name in ("gguf", "onnx"))
    assert in_gguf is not None and in_onnx is not None
    assert (in_gguf.file_bytes, in_onnx.file_bytes) == (
        2 * values,
        4 * values * backends.format_of("onnx").adapter_factor,
    )
    prefix = MethodSpec.model_validate({"name": "prefix", "num_virtual_tokens": 5})
    for engine, width in (("gguf", 2), ("onnx", 4)):
        size = size_in_memory(prefix, Prefix.shape, shape, engine, dtype="f16")
        assert size is not None
        assert (size.file_bytes, size.modules, size.is_prefix) == (5 * 2 * 2 * 32 * width, 0, True)
    assert size_in_memory(lora(), "merged", shape, "gguf", dtype="f16") is None
