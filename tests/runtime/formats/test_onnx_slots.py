from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from edgetune_runtime.errors import EdgetuneError, IncompatibleError, VerificationError
from edgetune_runtime.formats.onnx_file import OnnxHeader, Value
from edgetune_runtime.formats.onnx_slots import (
    bottleneck_slot,
    check_arrays,
    in_groups,
    slots_of,
    summed,
)

SLOT = bottleneck_slot("model.layers.0.mlp", "relu", "output")
LORA = "model.layers.0.attn.q_proj"
FACTORS = "model.layers.0.attn.qkv_proj.output_scaling"
A, B = f"{LORA}.lora_A.weight", f"{LORA}.lora_B.weight"
FLOAT, HALF = 1, 10
Shape = tuple[int | str, ...]

INPUTS: Mapping[str, Shape] = {
    A: (6, "r"),
    B: ("r", 8),
    FACTORS: (12,),
    f"{SLOT}.down": (6, "r"),
    f"{SLOT}.down_bias": ("r",),
    f"{SLOT}.up": ("r", 8),
    f"{SLOT}.up_bias": (8,),
}
DEFAULTS: Mapping[str, Shape] = {
    A: (6, 0),
    B: (0, 8),
    FACTORS: (12,),
    f"{SLOT}.down": (6, 0),
    f"{SLOT}.down_bias": (0,),
    f"{SLOT}.up": (0, 8),
    f"{SLOT}.up_bias": (8,),
}
SLOTS = {FACTORS: (12,), f"{SLOT}.down": (6, None), f"{SLOT}.down_bias": (None,), f"{SLOT}.up": (None, 8)}
SLOTS |= {f"{SLOT}.up_bias": (8,), A: (6, None), B: (None, 8)}

GROUPED_INPUTS = {**INPUTS, A: ("groups", 6, "w"), f"{SLOT}.down": ("g", 6, "width")}
GROUPED_DEFAULTS = {**DEFAULTS, A: (1, 6, 0), f"{SLOT}.down": (1, 6, 0)}
GROUPED_SLOTS = {**SLOTS, A: (None, 6, None), f"{SLOT}.down": (None, 6, None)}


def header(inputs: Mapping[str, Shape], defaults: Mapping[str, Shape], elem_type: int = FLOAT) -> OnnxHeader:
    tables = ({name: Value(name, elem_type, shape) for name, shape in table.items()} for table in (inputs, defaults))
    given, initializers = tables
    other = {"input_ids": Value("input_ids", 7, ("batch", "sequence"))}
    return OnnxHeader({**other, **given}, {}, initializers, (), {}, frozenset())


def arrays(rank: int = 3) -> dict[str, np.ndarray]:
    shapes = {"down": (6, rank), "down_bias": (rank,), "up": (rank, 8), "up_bias": (8,)}
    network = {f"{SLOT}.{part}": np.ones(shape, np.float32) for part, shape in shapes.items()}
    low_rank = {A: np.ones((6, rank), np.float32), B: np.ones((rank, 8), np.float32)}
    return {**low_rank, FACTORS: np.ones(12, np.float32), **network}


def grouped(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**given, **{name: in_groups(given[name]) for name in (A, f"{SLOT}.down")}}


def columns_of(groups: np.ndarray) -> np.ndarray:
    return np.concatenate(list(groups), axis=-1)


@pytest.mark.parametrize(("rank", "groups"), [(8, 1), (16, 1), (24, 2), (48, 3), (33, 3), (34, 17), (17, 17)])
def test_columns_are_in_few_groups_of_equal_width(rank: int, groups: int) -> None:
    columns = np.random.default_rng(0).normal(size=(6, rank)).astype(np.float32)
    assert in_groups(columns).shape == (groups, 6, rank // groups)
    np.testing.assert_array_equal(columns_of(in_groups(columns)), columns)


def test_slots_have_the_shapes_of_their_inputs() -> None:
    assert slots_of(header(INPUTS, DEFAULTS)) == SLOTS


def test_wide_factors_may_be_in_groups() -> None:
    assert slots_of(header(GROUPED_INPUTS, GROUPED_DEFAULTS)) == GROUPED_SLOTS
    check_arrays(grouped(arrays(20)), GROUPED_SLOTS, "command")


def test_constants_with_the_names_of_slots_and_other_inputs_are_none() -> None:
    assert slots_of(header({}, DEFAULTS)) == {}
    assert slots_of(header(dict.fromkeys(("past_key_values.0.key", "a.down", "x.up"), (2, 3)), {})) == {}


@pytest.mark.parametrize(
    ("inputs", "defaults", "named"),
    [
        ({FACTORS: (12, 1)}, {}, FACTORS),
        ({FACTORS: ("width",)}, {}, FACTORS),
        ({FACTORS: (0,)}, {FACTORS: (0,)}, FACTORS),
        ({}, {FACTORS: (13,)}, FACTORS),
        ({f"{SLOT}.down": (6, "other")}, {}, SLOT),
        ({f"{SLOT}.down": (6, 4)}, {}, SLOT),
        ({f"{SLOT}.down": (6, "")}, {}, SLOT),
        ({f"{SLOT}.down_bias": (3,)}, {}, SLOT),
        ({f"{SLOT}.up": ("r", 9)}, {}, SLOT),
        ({f"{SLOT}.up_bias": ("r",)}, {}, SLOT),
        ({}, {f"{SLOT}.up": (1, 8)}, SLOT),
        ({}, {f"{SLOT}.up_bias": (7,)}, SLOT),
        ({A: (6, "other")}, {}, LORA),
        ({A: (6, ""), B: ("", 8)}, {}, LORA),
        ({A: (6, 0), B: (0, 8)}, {}, LORA),
        ({A: ("width", "r")}, {}, LORA),
        ({A: (6, "r", 1)}, {}, LORA),
        ({A: (5, "r")}, {}, LORA),
        ({B: ("r", 9)}, {}, LORA),
        ({}, {A: (6, 1), B: (1, 8)}, LORA),
        ({}, {B: (0, 9)}, LORA),
        ({A: (0, "r")}, {A: (0, 0)}, LORA),
        ({A: ("groups", 6, "width")}, {}, LORA),
        ({A: ("groups", 6, "width")}, {A: (0, 6, 0)}, LORA),
        ({A: ("groups", 6, 16)}, {A: (1, 6, 16)}, LORA),
        ({A: (2, 6, "width")}, {A: (2, 6, 0)}, LORA),
        ({B: (1, "r", 8)}, {B: (1, 0, 8)}, LORA),
    ],
)
def test_a_graph_s_slot_that_does_not_fit_is_named(
    inputs: Mapping[str, Shape], defaults: Mapping[str, Shape], named: str
) -> None:
    with pytest.raises(VerificationError, match=f"slots are damaged: '{named}'"):
        slots_of(header({**INPUTS, **inputs}, {**DEFAULTS, **defaults}))


@pytest.mark.parametrize("name", list(INPUTS))
def test_a_graph_s_slot_without_a_default_an_input_or_in_another_type_is_named(name: str) -> None:
    slot = LORA if name in (A, B) else name if name == FACTORS else SLOT
    inputs, defaults = ({key: table[key] for key in table if key != name} for table in (INPUTS, DEFAULTS))
    damaged = [header(INPUTS, defaults), header(INPUTS, DEFAULTS, HALF)]
    if name != FACTORS:
        damaged.append(header(inputs, DEFAULTS))
    half = header(INPUTS, DEFAULTS)
    damaged.append(replace(half, initializers={**half.initializers, name: Value(name, HALF, DEFAULTS[name])}))
    for one in damaged:
        with pytest.raises(VerificationError, match=f"'{slot}'"):
            slots_of(one)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kept", [list(INPUTS), [FACTORS], [A, B], [name for name in INPUTS if name != FACTORS]])
def test_a_sound_adapter_passes(kept: list[str], dtype: type) -> None:
    check_arrays({name: arrays()[name].astype(dtype) for name in kept}, SLOTS, "command")


def odd(value: float) -> np.ndarray:
    return np.array([1] * 11 + [value], np.float32)


@pytest.mark.parametrize(
    ("changed", "error", "reason"),
    [
        ({FACTORS: odd(np.nan)}, VerificationError, "output_scaling' has values that are not finite"),
        ({FACTORS: odd(np.inf)}, VerificationError, "output_scaling' has values that are not finite"),
        ({FACTORS: np.ones((1, 12), np.float32)}, VerificationError, r"shape \(1, 12\) instead of 1 dimensions"),
        ({FACTORS: np.ones(11, np.float32)}, IncompatibleError, r"shape \(11,\), the graph needs \(12,\)"),
        ({f"{SLOT}.up": np.ones((3, 7), np.float32)}, IncompatibleError, r"\(3, 7\), the graph needs \('rank', 8\)"),
        ({f"{SLOT}.down": np.ones((6, 4), np.float32)}, VerificationError, "has different ranks: 3 and 4"),
        ({f"{SLOT}.down_bias": np.ones(2, np.float32)}, VerificationError, "has different ranks: 2 and 3"),
        (arrays(0), VerificationError, "has rank 0"),
        ({A: np.ones((6, 4), np.float32)}, VerificationError, "q_proj' has different ranks: 3 and 4"),
        ({A: np.ones(6, np.float32)}, VerificationError, "lora_A.weight' has shape .* instead of 2 dimensions"),
        ({A: np.full((6, 3), np.nan, np.float32)}, VerificationError, "lora_A.weight' has values that are not finite"),
        ({B: np.full((3, 8), np.inf, np.float32)}, VerificationError, "lora_B.weight' has values that are not finite"),
        ({A: np.ones((5, 3), np.float32)}, IncompatibleError, r"lora_A.weight' has shape \(5, 3\), the graph needs"),
        ({B: np.ones((3, 7), np.float32)}, IncompatibleError, r"lora_B.weight' has shape \(3, 7\), the graph needs"),
        ({LORA: np.ones((6, 3), np.float32)}, IncompatibleError, "unknown slot"),
        ({"other.output_scaling": np.ones(3, np.float32)}, IncompatibleError, "unknown slot 'other"),
        ({"x.lora_A.weight": np.ones((6, 3), np.float32)}, IncompatibleError, "unknown slot 'x"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    changed: dict[str, np.ndarray], error: type[EdgetuneError], reason: str
) -> None:
    with pytest.raises(error, match=rf"'command'.*{reason}") as caught:
        check_arrays({**arrays(), **changed}, SLOTS, "command")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "slots", "error", "reason"),
    [
        ({}, SLOTS, VerificationError, r"has shape \(2, 6, 10\) instead of 2 dimensions"),
        ({A: np.ones((6, 20), np.float32)}, GROUPED_SLOTS, VerificationError, r"\(6, 20\) instead of 3 dimensions"),
        ({A: np.ones((2, 6, 9), np.float32)}, GROUPED_SLOTS, VerificationError, "has different ranks: 18 and 20"),
        ({A: np.ones((2, 5, 10), np.float32)}, GROUPED_SLOTS, IncompatibleError, r"\(2, 5, 10\), the graph needs"),
        (
            {A: np.ones((0, 6, 10), np.float32), B: np.ones((0, 8), np.float32)},
            GROUPED_SLOTS,
            VerificationError,
            "has rank 0",
        ),
    ],
)
def test_a_grouped_adapter_that_does_not_fit_is_refused(
    changed: dict[str, np.ndarray], slots: Mapping[str, tuple[int | None, ...]], error: type[EdgetuneError], reason: str
) -> None:
    with pytest.raises(error, match=rf"'command'.*{reason}"):
        check_arrays({**grouped(arrays(20)), **changed}, slots, "command")


@pytest.mark.parametrize("name", [name for name in INPUTS if name != FACTORS])
def test_an_adapter_with_a_part_of_a_slot_is_refused(name: str) -> None:
    given = {key: array for key, array in arrays().items() if key != name}
    slot = LORA if name in (A, B) else SLOT
    with pytest.raises(VerificationError, match=f"'{slot}' has no {name.removeprefix(slot)[1:]};"):
        check_arrays(given, SLOTS, "command")


def test_of_many_problems_three_are_named() -> None:
    unknown = {f"m{i}.lora_A.weight": np.ones((6, 3), np.float32) for i in range(5)}
    with pytest.raises(VerificationError, match=r"no lora_B.*m0.*m1.* and 3 more"):
        check_arrays({A: np.ones((6, 3), np.float32), **unknown}, SLOTS, "command")
    many = {f"m{i}{part}": shape for i in range(5) for part, shape in ((".lora_A.weight", (6, "r")),)}
    with pytest.raises(VerificationError, match=r"m0.*m1.*m2.*2 more"):
        slots_of(header(many, {}))


def test_an_adapter_without_tensors_is_refused() -> None:
    with pytest.raises(VerificationError, match="'command' has no tensors"):
        check_arrays({}, SLOTS, "command")


def test_factors_of_several_adapters_are_multiplied_each_at_its_scale() -> None:
    parts = [(np.array([3, 0], np.float32), 0.5), (np.array([2, -1], np.float32), -1.0)]
    np.testing.assert_array_equal(summed(FACTORS, parts), np.array([2 * 0, 0.5 * 3], np.float32))


def test_a_factor_that_no_scale_changes_is_not_copied() -> None:
    down = np.ones((3, 2), np.float32)
    assert summed("layer.lora_A.weight", [(down, 0.5)]) is down


def test_the_columns_of_grouped_factors_are_in_the_order_of_the_rows_of_b() -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(6, rank)).astype(np.float32), scale) for rank, scale in ((24, 0.5), (18, 2.0))]
    joined = summed(A, [(in_groups(columns), scale) for columns, scale in parts])
    assert joined.shape == (3, 6, 14)
    assert joined.flags.c_contiguous
    np.testing.assert_array_equal(columns_of(joined), np.concatenate([columns for columns, _ in parts], axis=1))


def test_bottlenecks_of_several_adapters_compute_the_sum_of_what_each_computes() -> None:
    rng = np.random.default_rng(0)
    both = [
        {name: rng.normal(size=array.shape).astype(np.float32) for name, array in arrays(n).items()} for n in (2, 5)
    ]
    scales, x = (0.5, -2.0), rng.normal(size=(4, 6)).astype(np.float32)

    def network(own: Mapping[str, np.ndarray]) -> np.ndarray:
        down, down_bias, up, up_bias = (own[f"{SLOT}.{part}"] for part in ("down", "down_bias", "up", "up_bias"))
        added: np.ndarray = np.maximum(x @ down + down_bias, 0) @ up + up_bias
        return added

    names = [name for name in INPUTS if name != FACTORS]
    together = {name: summed(name, [(one[name], s) for one, s in zip(both, scales, strict=True)]) for name in names}
    assert {array.dtype for array in together.values()} == {np.dtype(np.float32)}
    check_arrays(together, SLOTS, "both")
    expected = sum(s * network(one) for one, s in zip(both, scales, strict=True))
    np.testing.assert_allclose(network(together), expected, atol=1e-5)
