"""The table of tensor types and quantizations.

A tensor type is how one tensor of a GGUF file stores its values (`q4_k`). A quantization is what a recipe requests
(`q4_k_m`); it determines the type of each tensor. Standard library only.

Sources, all in llama.cpp: `ggml_type` in ggml.h and `type_traits` in ggml.c for the numbers and blocks of types,
`llama_ftype` in llama.h for the numbers of quantizations, llama-quant.cpp for the type that each tensor gets and for
rows that a block does not divide, ggml-cpu/repack.cpp for what is repacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgetune_runtime.errors import UsageError

DEFAULT = "q8_0"
"""Quantization of a converted base, unless another one is requested."""
FLOATS = ("f32", "f16", "bf16")
"""Unquantized tensor types, which llama.cpp's converter writes directly. Quantizations have the same names."""


@dataclass(frozen=True)
class TensorType:
    """How a tensor stores its values: blocks of `block` values in `block_bytes` bytes, scales included.

    `number` is ggml's `ggml_type`. `onnx_bits` is the width in which ONNX Runtime stores the values exactly, in
    MatMulNBits or float32; None if it requantizes them to 8 bits. llama.cpp reads all types exactly, and has faster
    code for `repacked` types, rearranged in memory, on x86 and ARM. llama.cpp stores rows that `block` does not divide
    as `narrow`, or as f16 if that is None. `has_grid`: the values of a block are evenly spaced, and training can follow
    their rounding.

    `kl` is the largest accepted mean KL of an adapter on a base of this type, at least three times what was measured:
    engines round activations to 8 bits before products with quantized weights, and llama.cpp rounds them to the
    weights' type before products with f16 or bf16. `merged_kl` is the same for merged models, whose adapted weights are
    requantized. None if nothing was measured; docs/measurements.md has the figures.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    onnx_bits: int | None = None
    repacked: bool = False
    narrow: str | None = None
    has_grid: bool = False
    kl: float | None = None
    merged_kl: float | None = None

    @property
    def bytes_per_value(self) -> float:
        """Bytes per value, scales included."""
        return self.block_bytes / self.block

    @property
    def bits(self) -> float:
        """Bits per value, scales included."""
        return 8 * self.bytes_per_value

    @property
    def is_float(self) -> bool:
        """Whether the type is unquantized."""
        return self.name in FLOATS


@dataclass(frozen=True)
class Quantization:
    """A quantization of llama.cpp that needs no importance matrix.

    `ftype` is its `llama_ftype`, which GGUF files contain. `most` is the type of most matrices, `some` that of half of
    the value and down projections (in q3_k_m of most of these and of the attention's output), `head` that of the output
    layer, which llama.cpp chooses unless `has_own_head`. Vectors stay f32. `on_boards`: `fit.choose` may choose it.
    """

    name: str
    ftype: int
    most: str
    some: str
    head: str
    on_boards: bool = False
    has_own_head: bool = False


_TYPES = (
    TensorType("f32", 0, 1, 4, onnx_bits=32, kl=1e-4, merged_kl=1e-4),
    TensorType("f16", 1, 1, 2, onnx_bits=32, kl=1e-4, merged_kl=1e-4),
    TensorType("bf16", 30, 1, 2, onnx_bits=32, kl=1e-3, merged_kl=2e-3),
    TensorType("q8_0", 8, 32, 34, onnx_bits=8, kl=0.03, merged_kl=0.05, has_grid=True),
    TensorType("q6_k", 14, 256, 210, narrow="q8_0", kl=0.03, merged_kl=0.1, has_grid=True),
    TensorType("q5_k", 13, 256, 176, narrow="q5_1", kl=0.03, merged_kl=0.3, has_grid=True),
    TensorType("q5_1", 7, 32, 24, kl=0.03, merged_kl=0.3, has_grid=True),
    TensorType("q5_0", 6, 32, 22, onnx_bits=8, kl=0.03, merged_kl=0.3, has_grid=True),
    TensorType("q4_k", 12, 256, 144, narrow="q5_0", repacked=True, kl=0.03, merged_kl=0.5, has_grid=True),
    TensorType("q4_1", 3, 32, 20, kl=0.03, merged_kl=0.5, has_grid=True),
    TensorType("q4_0", 2, 32, 18, onnx_bits=4, repacked=True, kl=0.03, merged_kl=0.5, has_grid=True),
    TensorType("iq4_nl", 20, 32, 18, repacked=True, kl=0.03, merged_kl=0.5),
    TensorType("iq4_xs", 23, 256, 136, narrow="iq4_nl", kl=0.03, merged_kl=0.5),
    TensorType("q3_k", 11, 256, 110, narrow="q4_0"),
    TensorType("q2_k", 10, 256, 84),
    TensorType("iq3_s", 21, 256, 110),
    TensorType("iq3_xxs", 18, 256, 98),
    TensorType("iq2_s", 22, 256, 82),
    TensorType("iq2_xs", 17, 256, 74),
    TensorType("iq2_xxs", 16, 256, 66),
    TensorType("iq1_m", 29, 256, 56),
    TensorType("iq1_s", 19, 256, 50),
    TensorType("tq2_0", 35, 256, 66),
    TensorType("tq1_0", 34, 256, 54),
    TensorType("mxfp4", 39, 32, 17),
    TensorType("nvfp4", 40, 64, 36),
    TensorType("q2_0", 42, 64, 18),
    TensorType("q1_0", 41, 128, 18),
    TensorType("q8_1", 9, 32, 40),
    TensorType("q8_k", 15, 256, 292),
    TensorType("f64", 28, 1, 8),
    TensorType("i64", 27, 1, 8),
    TensorType("i32", 26, 1, 4),
    TensorType("i16", 25, 1, 2),
    TensorType("i8", 24, 1, 1),
)

_QUANTIZATIONS = (
    Quantization("f32", 0, "f32", "f32", "f32"),
    Quantization("f16", 1, "f16", "f16", "f16"),
    Quantization("bf16", 32, "bf16", "bf16", "bf16"),
    Quantization("q8_0", 7, "q8_0", "q8_0", "q8_0", on_boards=True),
    Quantization("q6_k", 18, "q6_k", "q6_k", "q6_k", on_boards=True),
    Quantization("q5_k_m", 17, "q5_k", "q6_k", "q6_k", on_boards=True),
    Quantization("q5_k_s", 16, "q5_k", "q5_k", "q6_k"),
    Quantization("q5_1", 9, "q5_1", "q5_1", "q6_k"),
    Quantization("q5_0", 8, "q5_0", "q5_0", "q6_k"),
    Quantization("q4_k_m", 15, "q4_k", "q6_k", "q6_k", on_boards=True),
    Quantization("q4_k_s", 14, "q4_k", "q5_k", "q6_k"),
    Quantization("q4_1", 3, "q4_1", "q4_1", "q6_k"),
    Quantization("q4_0", 2, "q4_0", "q4_0", "q6_k", on_boards=True),
    Quantization("iq4_nl", 25, "iq4_nl", "iq4_nl", "q6_k"),
    Quantization("iq4_xs", 30, "iq4_xs", "iq4_xs", "q6_k"),
    Quantization("q3_k_m", 12, "q3_k", "q4_k", "q6_k"),
)

TENSOR_TYPES: Mapping[str, TensorType] = {kind.name: kind for kind in _TYPES}
"""Tensor types by name."""
TYPES_BY_NUMBER: Mapping[int, TensorType] = {kind.number: kind for kind in _TYPES}
"""Tensor types by ggml's number."""
QUANTIZATIONS: Mapping[str, Quantization] = {item.name: item for item in _QUANTIZATIONS}
"""Quantizations by name, from best to lowest quality."""
HEAD_TYPES = tuple(dict.fromkeys(item.most for item in _QUANTIZATIONS))
"""What can follow the + of a quantization."""


def quantization_named(name: str) -> Quantization:
    """The quantization `name`; `q5_0+q4_0` is q5_0 with the output layer in q4_0. UsageError lists the known ones."""
    body, has_own_head, head = name.partition("+")
    if body not in QUANTIZATIONS:
        raise UsageError(f"no quantization {body!r}", f"choose one of: {', '.join(QUANTIZATIONS)}")
    if not has_own_head:
        return QUANTIZATIONS[body]
    if head not in HEAD_TYPES:
        raise UsageError(f"no type {head!r} of the output layer", f"choose one of: {', '.join(HEAD_TYPES)}")
    if body in FLOATS:
        raise UsageError(f"{body} has no other type of the output layer", f"use {body}, or another quantization")
    return replace(QUANTIZATIONS[body], name=name, head=head, on_boards=False, has_own_head=True)


def repacked_types(instruction_sets: Iterable[str]) -> frozenset[str]:
    """The types that llama.cpp can repack on a processor with these instruction sets, by name.

    More than those that it is asked to repack: see `TensorType.repacked`. Source: ggml-cpu/repack.cpp and amx/amx.cpp.
    """
    has = set(instruction_sets)
    if not has & {"avx2", "dotprod"}:
        return frozenset()
    finer = {"q8_0", "q6_k"} if has & {"dotprod", "amx-int8"} else set()
    return frozenset({kind.name for kind in _TYPES if kind.repacked} | finer)


def main_type(values_by_type: Mapping[str, int]) -> TensorType:
    """The type with the most bytes, from the number of values in each type."""
    types = (TENSOR_TYPES[name] for name in values_by_type)
    return max(types, key=lambda kind: values_by_type[kind.name] * kind.bytes_per_value)


def quantization_of_merged(
    layer_types: Iterable[str], requested: str | None, *, trains_on_grid: bool = False
) -> str | None:
    """The quantization of merged models on a base whose layers have these types; None if they keep the base's types.

    Unless one is requested, models that are trained on the base's grid keep its types. Others have q8_0 if any layer
    has fewer than 8 bits: requantized to fewer bits, weights lose much of what was trained. A mean KL of 2 to 3 was
    measured with q4_0, and of .05 with q8_0 and a third of the weights in q6_k.
    """
    types = [TENSOR_TYPES[name] for name in layer_types]
    fewest = TENSOR_TYPES["q8_0"].bits
    keeps_types = all(kind.bits >= fewest or (trains_on_grid and kind.has_grid) for kind in types)
    return requested or (None if keeps_types else "q8_0")


def gains_from_grid(layer_types: Sequence[str], requested: str | None = None) -> bool:
    """Whether a merged model keeps the base's types only if it is trained on the base's grid."""
    on_grid, nearest = (quantization_of_merged(layer_types, requested, trains_on_grid=way) for way in (True, False))
    return on_grid != nearest
