"""The graph's slots for adapters, and the check and the sum of adapters' arrays for them.

A slot is a set of optional inputs. A low-rank update is two inputs, of rank 0 by default. A scaling is one input, of
ones by default. A bottleneck is four inputs, of rank 0 by default; its name contains its activation function and its
input, because both are fixed in the graph.

A graph has wide A and down projections in groups of columns, [groups, in, width] in place of [in, rank]: MLAS divides
the columns of a wider product among threads, depending on the rows, and each part sums other blocks of the inputs. With
groups, which it divides as a whole, a row has the same bits however many rows a step has (docs/measurements.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgetune_runtime.errors import IncompatibleError, VerificationError
from edgetune_runtime.wording import COPY_FILE_AGAIN, first_of

from .onnx_file import OnnxHeader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Shape = tuple[int | None, ...]
"""The shape of a slot's input; None is the rank, or the number or width of groups, which differ between adapters."""

GROUP_COLUMNS = 16
"""Most columns of a group: the least that MLAS gives to a thread."""

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

SCALINGS = {"output": ".output_scaling", "input": ".input_scaling"}
"""Suffix of a scaling's input, by the side of the matrix product that it scales."""

DOWN, DOWN_BIAS, UP, UP_BIAS = ".down", ".down_bias", ".up", ".up_bias"

_LOW_RANK = {LORA_A: ("columns", "rank"), LORA_B: ("rank", "rows")}
_BOTTLENECK = {DOWN: ("columns", "rank"), DOWN_BIAS: ("rank",), UP: ("rank", "rows"), UP_BIAS: ("rows",)}
_SCALING = {"": ("width",)}
_IN_GROUPS = ("groups", "columns", "group width")
_FREE = {"rank": 0, "groups": 1, "group width": 0}
"""Dimensions that differ between adapters, with their default."""
_BOTTLENECK_NAME = re.compile(r"(?P<slot>.+\.bottleneck_[a-z]+_[a-z]+)(\.down|\.down_bias|\.up|\.up_bias)")
_FLOAT = 1


def bottleneck_slot(block: str, activation: str, reads: str) -> str:
    """The slot for a block's bottlenecks of one kind; its inputs end in `.down`, `.down_bias`, `.up` and `.up_bias`."""
    return f"{block}.bottleneck_{activation}_{reads}"


def slots_of(header: OnnxHeader) -> dict[str, Shape]:
    """The inputs of the graph's slots with their shapes.

    All are float32: a low-rank update [in, rank] and [rank, out], a scaling [width], a bottleneck [in, rank], [rank],
    [rank, out] and [out]; [in, rank] may be in groups. VerificationError names the slots without an input or a default,
    and those with shapes that do not fit together.
    """
    slots: dict[str, Shape] = {}
    problems = []
    for slot, parts in _by_slot(header.inputs, {name: value.shape for name, value in header.inputs.items()}).items():
        shapes = _slot_shapes(header, slot, parts)
        if shapes is None:
            problems.append(f"{slot[:80]!r}")
        else:
            slots |= shapes
    if problems:
        raise VerificationError(f"the graph's adapter slots are damaged: {first_of(problems)}", COPY_FILE_AGAIN)
    return slots


def check_arrays(arrays: Mapping[str, NDArray[np.generic]], slots: Mapping[str, Shape], name: str) -> None:
    """Check that an adapter's arrays are valid and fit `slots`; `name` is the adapter's name in errors.

    Raises VerificationError when the file is invalid, and IncompatibleError when it is valid but not for this graph,
    with up to three problems.
    """
    foreign = [f"unknown slot {key[:80]!r}" for key in arrays if key not in slots]
    damaged: list[str] = []
    for slot, parts in _by_slot((key for key in arrays if key in slots), slots).items():
        own = _contradictions(arrays, slot, parts)
        damaged += own
        for key in () if own else (slot + part for part in parts):
            misfits = zip(arrays[key].shape, slots[key], strict=True)
            if any(width is not None and size != width for size, width in misfits):
                shape = tuple("rank" if width is None else width for width in slots[key])
                foreign.append(f"{key!r} has shape {arrays[key].shape}, the graph needs {shape}")
    if not arrays:
        raise VerificationError(f"adapter {name!r} has no tensors", COPY_FILE_AGAIN)
    if damaged:
        raise VerificationError(f"adapter {name!r} is damaged: {first_of(damaged + foreign)}", COPY_FILE_AGAIN)
    if foreign:
        message = f"adapter {name!r} does not fit the graph: {first_of(foreign)}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")


def in_groups(columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """[in, rank] in as few groups of equal width as possible: [groups, in, width]."""
    rank = columns.shape[1]
    width = max(width for width in range(1, GROUP_COLUMNS + 1) if rank % width == 0)
    return columns.reshape(-1, rank // width, width).transpose(1, 0, 2)


def is_grouped(shape: Sequence[object]) -> bool:
    """Whether A or a down projection of this shape is in groups."""
    return len(shape) == len(_IN_GROUPS)


def _joined(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `in_groups`."""
    return groups.transpose(1, 0, 2).reshape(groups.shape[1], -1)


def value_problem(array: NDArray[np.generic]) -> str | None:
    """What is wrong with the values of an adapter's array, if anything."""
    import numpy as np  # noqa: PLC0415 - reading a graph does not need it

    return None if np.isfinite(array).all() else "has values that are not finite"


def summed(name: str, parts: Sequence[tuple[NDArray[np.float32], float]]) -> NDArray[np.float32]:
    """Combine several adapters' arrays for the input `name`, given with their scales.

    Low-rank factors and bottlenecks are concatenated, with the scale in B and in the up projection. Scalings l are
    combined as the product of 1 + scale·(l - 1).
    """
    import numpy as np  # noqa: PLC0415 - reading a graph does not need it

    arrays, scales = [array for array, _ in parts], [np.float32(scale) for _, scale in parts]
    if name.endswith(tuple(SCALINGS.values())):
        one = np.float32(1)
        factors = [one + scale * (array - one) for array, scale in zip(arrays, scales, strict=True)]
        return np.asarray(np.prod(factors, axis=0), np.float32)
    if name.endswith((LORA_A, DOWN, DOWN_BIAS)):
        if len(arrays) == 1:
            return arrays[0]  # not a copy, as it may be mapped
        if is_grouped(arrays[0].shape):
            joined = np.concatenate([_joined(array) for array in arrays], axis=-1)
            return np.ascontiguousarray(in_groups(joined))
        return np.concatenate(arrays, axis=-1)
    scaled = [array * scale for array, scale in zip(arrays, scales, strict=True)]
    return np.concatenate(scaled) if name.endswith((LORA_B, UP)) else np.asarray(np.sum(scaled, axis=0), np.float32)


def _by_slot(names: Iterable[str], shapes: Mapping[str, Sequence[object]]) -> dict[str, Mapping[str, tuple[str, ...]]]:
    """The slots of those of these inputs that have one; each maps the suffix of an input to its dimensions.

    `shapes` are those of the graph's inputs, where A or down may be in groups.
    """
    slots: dict[str, Mapping[str, tuple[str, ...]]] = {}
    for name in names:
        if name.endswith((LORA_A, LORA_B)):
            slots[name[: -len(LORA_A)]] = _LOW_RANK
        elif name.endswith(tuple(SCALINGS.values())):
            slots[name] = _SCALING
        elif bottleneck := _BOTTLENECK_NAME.fullmatch(name):
            slots[bottleneck["slot"]] = _BOTTLENECK
    for slot, parts in slots.items():
        wide = [part for part in (LORA_A, DOWN) if part in parts and is_grouped(shapes.get(slot + part, ()))]
        slots[slot] = {**parts, **dict.fromkeys(wide, _IN_GROUPS)}
    return slots


def _slot_shapes(header: OnnxHeader, slot: str, parts: Mapping[str, tuple[str, ...]]) -> dict[str, Shape] | None:
    """The shapes of a slot's inputs; None when the slot is invalid."""
    sizes: dict[str, int | str] = {}
    for part, dimensions in parts.items():
        graph_input, default = (table.get(slot + part) for table in (header.inputs, header.initializers))
        if graph_input is None or default is None or {graph_input.elem_type, default.elem_type} != {_FLOAT}:
            return None
        if len(graph_input.shape) != len(dimensions):
            return None
        for dimension, size in zip(dimensions, graph_input.shape, strict=True):
            if sizes.setdefault(dimension, size) != size or not size or isinstance(size, str) != (dimension in _FREE):
                return None
        if default.shape != tuple(_FREE.get(dimension, sizes[dimension]) for dimension in dimensions):
            return None
    return {
        slot + part: tuple(size if isinstance(size := sizes[dimension], int) else None for dimension in dimensions)
        for part, dimensions in parts.items()
    }


def _contradictions(
    arrays: Mapping[str, NDArray[np.generic]], slot: str, parts: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """The problems of a slot's arrays that do not depend on the graph."""
    missing = [f"{slot!r} has no {part[1:]}" for part in parts if slot + part not in arrays]
    if missing:
        return missing
    problems, ranks = [], set()
    for part, dimensions in parts.items():
        array = arrays[slot + part]
        if array.ndim != len(dimensions):
            problems.append(f"{slot + part!r} has shape {array.shape} instead of {len(dimensions)} dimensions")
            continue
        free = [size for size, dimension in zip(array.shape, dimensions, strict=True) if dimension in _FREE]
        ranks |= {math.prod(free)} if free else set()
        if problem := value_problem(array):
            problems.append(f"{slot + part!r} {problem}")
    if len(ranks) > 1:
        problems.append(f"{slot!r} has different ranks: {' and '.join(map(str, sorted(ranks)))}")
    elif 0 in ranks:
        problems.append(f"{slot!r} has rank 0")
    return problems
