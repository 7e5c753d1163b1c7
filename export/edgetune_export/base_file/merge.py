"""Writes a copy of the base's file that has the parameters of a merged model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError
from edgetune_runtime.formats.atomic import replacing, require_space
from edgetune_runtime.formats.gguf_file import GgufHeader, TensorInfo, read_header
from edgetune_runtime.wording import first_of

from edgetune_export.adapters.shapes import Floats, Merged
from edgetune_export.architectures.layout import as_stored, in_file_order, name_map, tensor_name

from .rounding import rounded, rounded_on_grid


def write_merged(merged: Merged, base: Path, out: Path) -> None:
    """Write a copy of the base with the merged parameters: same header, same type and offset of each tensor.

    Only these parameters are rounded, by `rounded` or as in training. Raises IncompatibleError if one does not fit the
    base or if a tensor's type cannot be written, OutOfSpaceError if the disk is full.
    """
    header = read_header(base)
    if not merged.parameters:
        raise IncompatibleError(f"adapter {merged.name!r} changes no module", "train it with target modules")
    placed = _place_parameters(merged, header)
    rounding = rounded_on_grid if merged.on_grid else rounded
    with replacing(out) as temporary:
        require_space(out, base.stat().st_size)
        shutil.copyfile(base, temporary)
        with temporary.open("r+b") as file:
            for tensor, compute in placed:
                values = _stored(compute(), tensor, header).reshape(-1, tensor.shape[0])
                file.seek(tensor.offset)
                current = file.read(tensor.nbytes)
                file.seek(tensor.offset)
                file.write(rounding(current, tensor, values))


def _place_parameters(merged: Merged, header: GgufHeader) -> list[tuple[TensorInfo, Callable[[], Floats]]]:
    """The base's tensor of each parameter; IncompatibleError lists the parameters that have none."""
    names = name_map(header)
    placed, problems = [], []
    for parameter, compute in merged.parameters.items():
        tensor = header.tensors.get(tensor_name(parameter, names))
        if tensor is None:
            problems.append(f"the base has no tensor for {parameter}")
        else:
            placed.append((tensor, compute))
    if problems:
        message = f"adapter {merged.name!r} does not fit this base: {first_of(problems)}"
        raise IncompatibleError(message, "use the base that the adapter was trained on")
    return placed


def _stored(values: Floats, tensor: TensorInfo, header: GgufHeader) -> Floats:
    """A parameter as the file stores it, with rows and columns in the base's order."""
    values = as_stored(values, tensor, header)
    if values.shape[::-1] != tensor.shape:
        message = f"{tensor.name} is {tensor.shape[::-1]} in the base, {values.shape} in the merged model"
        raise IncompatibleError(message, "give the base that the model was trained from")
    return in_file_order(values, tensor, header)
