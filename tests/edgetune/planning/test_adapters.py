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
from edgetune.planning.adapters import with_options
from edgetune.planning.board import memory_of
from edgetune.planning.records import AdapterPlan

DTYPES = {"gguf": "f16", "onnx": "f32"}


def planned(base: Path, method: str = "lora", shape: str = "low_rank", **options: Any) -> AdapterPlan:  # noqa: ANN401
    chosen = methods.load(method).options(**options)
    plan = AdapterPlan("a", method, chosen, dict.fromkeys(DTYPES, shape), DTYPES)
    return with_options(plan, chosen, read_header(base), "auto")


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
    base = tiny_gguf(arch)
    plan, vocabulary = planned(base, **options), BaseShape.of_header(read_header(base)).vocabulary
    method = methods.load("lora")
    method.save(method.attach(make_model(arch, vocabulary), plan.options, 1), tmp_path / "peft")
    out = tmp_path / "adapter.gguf"
    write_adapter(fold_peft(tmp_path / "peft", "a"), base, out, dtype="f16", base_fingerprint=FINGERPRINT)
    size, written = memory_of(plan, "gguf", "gguf"), read_header(out)
    assert size is not None
    assert size.modules == len(written.tensors) // 2
    assert size.file_bytes == plan.bytes_by_format["gguf"] == sum(tensor.nbytes for tensor in written.tensors.values())


def test_a_single_target_module_may_be_written_as_text(tiny_gguf: Callable[[str], Path]) -> None:
    text, names = (planned(tiny_gguf("llama"), target_modules=targets) for targets in ("q_proj", ("q_proj",)))
    assert text.values_by_format == names.values_by_format
    assert text.modules == names.modules == 2


def test_modules_still_to_be_chosen_count_as_all_but_the_output_layer(tiny_gguf: Callable[[str], Path]) -> None:
    values = {
        targets: planned(tiny_gguf("llama"), target_modules=targets).values_by_format["gguf"]
        for targets in ("auto", "all-linear", "q_proj", ("lm_head", "q_proj"))
    }
    assert values["auto"] == values["all-linear"]
    assert values["lm_head", "q_proj"] > values["q_proj"]


def test_each_engine_holds_an_adapter_in_its_own_types(tiny_gguf: Callable[[str], Path]) -> None:
    base = tiny_gguf("llama")
    plan = planned(base)
    values = plan.values_by_format["gguf"]
    in_gguf, in_onnx = (memory_of(plan, engine, engine) for engine in ("gguf", "onnx"))
    assert in_gguf is not None and in_onnx is not None
    assert in_gguf.file_bytes == 2 * values
    assert in_onnx.file_bytes == 4 * values * backends.format_of("onnx").adapter_factor
    prefix = planned(base, "prefix", Prefix.shape, num_virtual_tokens=5)
    for engine, width in (("gguf", 2), ("onnx", 4)):
        size = memory_of(prefix, engine, engine)
        assert size is not None
        assert (size.file_bytes, size.modules, size.is_prefix) == (5 * 2 * 2 * 32 * width, 0, True)
    assert memory_of(planned(base, "full", "merged"), "gguf", "gguf") is None
