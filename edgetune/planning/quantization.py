"""Lists the quantizations of a base that a build measures, with their predicted sizes, and chooses one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune_devices.fit import main_type_of
from edgetune_runtime import engines
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.gguf_file import GgufHeader

from edgetune.recipe.model import Recipe
from edgetune.recipe.quantization import QuantizationSpec

MAX_TOKENS = 2048
"""What is read of the rows of all adapters together."""
MAX_KL = 0.15
"""Highest mean KL, in nats per token, of a quantization that is chosen for its size or speed; the source is in
docs/explanation/quantization.md."""
_WORTH_MEASURING = 0.75
"""Where the lowest KL is chosen: smaller candidates, as a share of the largest, are not measured."""
# k-quants have several types already. For the others the output layer is tried in these types, and in their own.
_MIXED = ("q8_0", "q6_k", "q5_k_m", "q4_k_m")
_HEADS = {"q5_0": ("q5_0", "q4_0"), "iq4_nl": ("q5_0", "iq4_nl"), "q4_0": ("q5_0", "q4_0")}
_NAMES = (*_MIXED, *_HEADS, *(f"{body}+{head}" for body, heads in _HEADS.items() for head in heads))


@dataclass(frozen=True)
class Candidate:
    """A quantization to measure, None for the base as it is, and the bytes of the base in it."""

    quantization: str | None
    bytes: int


@dataclass(frozen=True)
class MeasuredQuantization:
    """A candidate that was measured.

    `kl` is the mean KL divergence from the base before quantization, in nats per token; `tokens_per_s` the decode
    speed on this machine, None if it was not asked for.
    """

    quantization: str | None
    bytes: int
    kl: float
    tokens_per_s: float | None = None

    def __str__(self) -> str:
        """The figures, for people."""
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return f"{shown(self.quantization)}: {self.bytes / 1e6:.1f} MB, KL {self.kl:.3f}{speed}"


def candidates_of(recipe: Recipe, header: GgufHeader, bytes_of: Callable[[str | None], int]) -> tuple[Candidate, ...]:
    """The quantizations within the recipe's budget, the largest first; none if the recipe names one.

    `header` is the base's before quantization. Left out are those that llama.cpp stores as another one, because its
    blocks do not divide the base's rows, and those that a format of the recipe would requantize. Raises UsageError if
    none is within the budget.
    """
    spec = recipe.quantization
    if not isinstance(spec, QuantizationSpec):
        return ()
    predicted = set(recipe.targets).intersection(engines.names_with_needs())
    keeps_types = all(engines.load_needs(name).COST.has_tensor_types for name in predicted)
    by_result: dict[tuple[str, int], Candidate] = {}
    for name in _NAMES:
        kind, size = main_type_of(header, name), bytes_of(name)
        if keeps_types or kind.onnx_bits is not None:
            by_result.setdefault((kind.name, size), Candidate(name, size))
    found = list(by_result.values())
    if not header.main_type.is_float:
        # Requantizing a file to more bytes than it has would lose quality for nothing.
        unchanged = Candidate(None, bytes_of(None))
        found = [unchanged, *(item for item in found if item.bytes < unchanged.bytes)]
    found.sort(key=lambda item: item.bytes, reverse=True)
    within = [item for item in found if spec.budget_mb is None or item.bytes <= spec.budget_mb * 1e6]
    if not within:
        raise _over_budget(recipe, spec, found[-1])
    return tuple(within)


def worth_measuring(recipe: Recipe, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, the largest first, without those that will not be chosen, since larger ones are nearer."""
    spec = recipe.quantization
    if not isinstance(spec, QuantizationSpec) or spec.optimize != "score":
        return tuple(candidates)
    # Nothing is nearer to a base than itself.
    share = 1.0 if candidates[0].quantization is None else _WORTH_MEASURING
    return tuple(item for item in candidates if item.bytes >= share * candidates[0].bytes)


def best_of(measured: Sequence[MeasuredQuantization], recipe: Recipe) -> MeasuredQuantization:
    """The one that the recipe asks for.

    Raises UsageError, with the nearest, if none is within the budget, or none within `MAX_KL` where size or speed is
    to be optimized.
    """
    spec = recipe.quantization
    assert isinstance(spec, QuantizationSpec)
    within = [item for item in measured if spec.budget_mb is None or item.bytes <= spec.budget_mb * 1e6]
    if not within:
        raise _over_budget(recipe, spec, min(measured, key=lambda item: item.bytes))
    if spec.optimize == "score":
        return min(within, key=lambda item: (item.kl, item.bytes))
    near = [item for item in within if item.kl <= MAX_KL]
    if not near:
        nearest = min(within, key=lambda item: item.kl)
        message = (
            f"no quantization of {recipe.base!r} that may be chosen has a KL of at most {MAX_KL}; nearest is {nearest}"
        )
        matrix = "" if recipe.imatrix else "set imatrix: auto, "
        budget = "" if spec.budget_mb is None else "raise budget_mb, "
        raise UsageError(message, f"{matrix}{budget}or set optimize: score")
    if spec.optimize == "size":
        return min(near, key=lambda item: (item.bytes, item.kl))
    return max(near, key=lambda item: (item.tokens_per_s or 0.0, -item.kl))


def shown(quantization: str | None) -> str:
    """The name of a quantization for people."""
    return quantization or "as it is"


def _over_budget(recipe: Recipe, spec: QuantizationSpec, nearest: Candidate | MeasuredQuantization) -> UsageError:
    size = f"{nearest.bytes / 1e6:.1f} MB in {shown(nearest.quantization)}"
    message = f"quantization.budget_mb is {spec.budget_mb:g}, but base {recipe.base!r} takes at least {size}"
    return UsageError(message, "raise it, or choose a smaller base")
