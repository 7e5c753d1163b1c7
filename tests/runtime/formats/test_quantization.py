from __future__ import annotations

import gguf
import llama_cpp
import pytest
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.quantization import (
    DEFAULT,
    FLOATS,
    QUANTIZATIONS,
    TENSOR_TYPES,
    TYPES_BY_NUMBER,
    main_type,
    quantization_named,
    quantization_of_merged,
)


def test_tensor_types_have_the_sizes_that_gguf_gives_them() -> None:
    expected = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    found = {number: (kind.name, kind.block, kind.block_bytes) for number, kind in TYPES_BY_NUMBER.items()}
    assert {number: found.get(number) for number in expected} == expected
    assert len(TENSOR_TYPES) == len(TYPES_BY_NUMBER)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantizations_have_llama_cpps_numbers(name: str) -> None:
    which = "ALL" if name == "f32" else "MOSTLY"
    assert getattr(llama_cpp, f"LLAMA_FTYPE_{which}_{name.upper()}") == QUANTIZATIONS[name].ftype


def test_quantizations_are_made_of_known_types_and_come_best_first() -> None:
    used = {kind for item in QUANTIZATIONS.values() for kind in (item.most, item.some, item.head)}
    narrow = {kind.narrow for kind in TENSOR_TYPES.values() if kind.narrow}
    assert used | narrow | set(FLOATS) <= set(TENSOR_TYPES)
    assert {DEFAULT, *FLOATS} <= set(QUANTIZATIONS)
    bits = [round(TENSOR_TYPES[item.most].bits) for item in QUANTIZATIONS.values() if item.on_boards]
    assert bits == sorted(bits, reverse=True)


def test_the_error_about_an_unknown_quantization_lists_the_quantizations() -> None:
    with pytest.raises(UsageError, match=r"no quantization 'q9'; choose one of: f32, .*, q8_0, .*, q3_k_m"):
        quantization_named("q9")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q9+q4_0", "no quantization 'q9'; choose one of: f32, .*"),
        ("q5_0+q9", "no type 'q9' of the output layer; choose one of: f32, .*, q3_k"),
        ("q5_0+", "no type '' of the output layer; .*"),
        ("f16+q4_0", "f16 has no other type of the output layer; use f16, or another quantization"),
    ],
)
def test_an_unknown_type_of_the_output_layer_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        quantization_named(name)


def test_the_main_type_takes_the_most_bytes() -> None:
    assert main_type({"q4_0": 3000, "q8_0": 1000, "f32": 100}).name == "q4_0"
    assert main_type({"q4_0": 1000, "q8_0": 1000, "f32": 100}).name == "q8_0"


@pytest.mark.parametrize(
    ("base", "requested", "merged"),
    [
        (["q4_0"], None, "q8_0"),
        (["q6_k", "q8_0"], None, "q8_0"),
        (["q8_0"], None, None),
        (["bf16", "f32"], None, None),
        (["f16"], "q4_0", "q4_0"),
    ],
)
def test_merged_models_have_8_bits_at_least(base: list[str], requested: str | None, merged: str | None) -> None:
    assert quantization_of_merged(base, requested) == merged


@pytest.mark.parametrize(
    ("base", "requested", "merged"),
    [
        (["q4_0"], None, None),
        (["q4_0"], "q8_0", "q8_0"),
        (["q4_k", "q6_k"], None, None),
        (["iq4_nl", "q4_k"], None, "q8_0"),
        (["f16"], None, None),
    ],
)
def test_models_trained_on_the_bases_grid_keep_its_types(
    base: list[str], requested: str | None, merged: str | None
) -> None:
    assert quantization_of_merged(base, requested, trains_on_grid=True) == merged
