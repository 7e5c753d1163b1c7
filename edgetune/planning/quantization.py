"""The quantization of a base: the one that is requested, or those that a build measures to choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from edgetune_devices.changes import BOARD_QUANTIZATIONS
from edgetune_devices.needs import engine_of, needs_of_header
from edgetune_runtime import engines
from edgetune_runtime.engines import gguf
from edgetune_runtime.errors import UsageError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.formats.quantization import TENSOR_TYPES

from edgetune.bases import is_gguf
from edgetune.recipe.model import Recipe

MAX_TOKENS = 2048
"""What is read of the rows of all adapters together."""
MAX_KL = 0.2
"""Highest mean KL, in nats per token, of a quantization that is chosen for its size or speed; the source is in
docs/explanation/quantization.md."""
# Where the lowest KL is chosen: smaller candidates, as a share of the largest, are not measured.
_WORTH_MEASURING = 0.75
# k-quants have several types already. For the others the output layer is tried in these types too.
_HEADS = {"q5_0": ("q5_0", "q4_0"), "iq4_nl": ("q5_0", "iq4_nl"), "q4_0": ("q5_0", "q4_0")}
_NAMES = (
    *("q8_0", "q6_k", "q5_k_m", "q4_k_m", *_HEADS),
    *(f"{body}+{head}" for body, heads in _HEADS.items() for head in heads),
)


@dataclass(frozen=True)
class Candidate:
    """A quantization to measure, None for the base as it is, and the bytes of the base in it."""

    quantization: str | None
    bytes: int

    def __str__(self) -> str:
        """The name and the size, for people."""
        return f"{self.quantization or 'as it is'} {self.bytes / 1e6:,.1f} MB"


@dataclass(frozen=True)
class MeasuredCandidate(Candidate):
    """A candidate that was measured.

    `kl` is the mean KL divergence from the base before quantization, in nats per token; `tokens_per_s` the decode
    speed on this machine, None if it was not asked for.
    """

    kl: float
    tokens_per_s: float | None = None

    def __str__(self) -> str:
        """All figures, for people."""
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return f"{super().__str__()}, KL {self.kl:.3f}{speed}"


C = TypeVar("C", bound=Candidate)


def quantizations_of(recipe: Recipe, candidates: Sequence[Candidate] = ()) -> Sequence[str | None]:
    """The quantizations that a board may choose from, the best first, which is used without a board.

    None: the base's file ships unchanged, or the build measures `candidates` of which nothing is known yet.
    """
    if isinstance(recipe.quantization, str):
        return [recipe.quantization]
    if candidates:
        return [item.quantization for item in candidates]
    if recipe.quantization or is_gguf(recipe.base, recipe.folder) or "quantization" in recipe.task_type.refused_keys:
        return [None]
    # The first one is the default.
    return BOARD_QUANTIZATIONS


def candidates_of(recipe: Recipe, header: GgufHeader) -> list[Candidate]:
    """The quantizations within the recipe's budget, the largest first; none if the recipe names one.

    `header` is the base's before quantization; sizes are those in GGUF, if that is a target. Left out
    are those that llama.cpp stores as another one, because its blocks do not divide the base's rows, and those that a
    format of the recipe would requantize, but for the file as it is. Raises UsageError if none is within the budget.
    """
    if recipe.quantization_spec is None:
        return []
    predicted = set(recipe.targets).intersection(engines.names_with_needs())
    keeps_types = all(engines.load_needs(name).COST.has_tensor_types for name in predicted)
    engine = engine_of(gguf.NAME if gguf.NAME in recipe.targets else recipe.targets[0])
    needs_of = partial(needs_of_header, header, context_length=1, engine=engine)
    by_result: dict[tuple[str, int], Candidate] = {}
    for name in _NAMES:
        needs = needs_of(quantization=name)
        if keeps_types or all(TENSOR_TYPES[kind].onnx_bits is not None for kind in needs.layer_types):
            by_result.setdefault((needs.main_type, needs.base_bytes), Candidate(name, needs.base_bytes))
    candidates = sorted(by_result.values(), key=lambda item: item.bytes, reverse=True)
    if not header.main_type.is_float:
        # Requantizing a file to more bytes than it has would lose quality for nothing.
        unchanged = Candidate(None, needs_of().base_bytes)
        candidates = [unchanged, *(item for item in candidates if item.bytes < unchanged.bytes)]
    return _within_budget(recipe, candidates)


def worth_measuring(recipe: Recipe, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, the largest first, without those that will not be chosen, since larger ones are nearer."""
    if not candidates or recipe.quantization_spec is None or recipe.quantization_spec.optimize != "score":
        return tuple(candidates)
    # Nothing is nearer to a base than itself.
    share = 1.0 if candidates[0].quantization is None else _WORTH_MEASURING
    return tuple(item for item in candidates if item.bytes >= share * candidates[0].bytes)


def best_of(measured: Sequence[MeasuredCandidate], recipe: Recipe) -> MeasuredCandidate:
    """The one that the recipe asks for.

    Raises UsageError, with the nearest, if none is within the budget, or none within `MAX_KL` where size or speed is
    to be optimized.
    """
    spec, within = recipe.quantization_spec, _within_budget(recipe, measured)
    assert spec is not None
    nearest = min(within, key=lambda item: (item.kl, item.bytes))
    if spec.optimize == "score":
        return nearest
    near = [item for item in within if item.kl <= MAX_KL]
    if not near:
        message = f"no quantization of {recipe.base!r} has a KL of at most {MAX_KL}; the nearest is {nearest}"
        matrix = "" if recipe.imatrix else "set imatrix: auto, "
        budget = "" if spec.budget_mb is None else "raise budget_mb, "
        raise UsageError(message, f"{matrix}{budget}or set optimize: score")
    if spec.optimize == "size":
        return min(near, key=lambda item: (item.bytes, item.kl))
    return max(near, key=lambda item: (item.tokens_per_s or 0.0, -item.kl))


def _within_budget(recipe: Recipe, candidates: Sequence[C]) -> list[C]:
    assert recipe.quantization_spec is not None
    budget_mb = recipe.quantization_spec.budget_mb
    within = [item for item in candidates if budget_mb is None or item.bytes <= budget_mb * 1e6]
    if not within:
        smallest = min(candidates, key=lambda item: item.bytes)
        message = f"quantization.budget_mb is {budget_mb:g}, but the smallest of base {recipe.base!r} is {smallest}"
        # Two decimals, rounded up: enough for the next try.
        enough = math.ceil(smallest.bytes / 1e4) / 100
        raise UsageError(message, f"raise it to {enough:.2f}, or choose a smaller base")
    return within
