"""Memory and disk space that a build needs, reported before any work and refused if this machine has too little.

Predicted from the base's header and the recipe, without torch; MB are 10^6 bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune_devices import fit
from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.format import PROCESS_MB
from edgetune_runtime.errors import IncompatibleError, OutOfSpaceError, UsageError
from edgetune_runtime.formats.gguf_file import GgufHeader
from edgetune_runtime.threads import machine

from . import bases, methods
from .adapter_sizes import shipped_values
from .data import TaskRow
from .recipe.model import Recipe
from .recipe.parts import TrainingSpec
from .targets import shapes_in
from .tasks import Task
from .training.memory import saved_states_mb, training_need

_FLOAT = 4
# Characters per token, a low estimate.
_CHARACTERS = 3


@dataclass(frozen=True)
class BuildNeeds:
    """What a build needs, in 10^6 bytes.

    Memory: `training_mb` and `export_mb`; at least `least_training_mb` with the smallest forward passes, and
    `least_export_mb` with the base's float32 weights, `weights_mb`, mapped from disk.

    Disk: up to `disk_mb` at a time, of which the bundle is `bundle_mb`; at least `least_disk_mb`. `others_mb` is the
    part of the bundle that all formats but the first add.
    """

    parameters: int
    weights_mb: float
    training_mb: float
    least_training_mb: float
    export_mb: float
    least_export_mb: float
    bundle_mb: float
    disk_mb: float
    least_disk_mb: float
    others_mb: float

    @property
    def memory_mb(self) -> float:
        """The memory of the largest stage."""
        return max(self.training_mb, self.export_mb)

    @property
    def least_memory_mb(self) -> float:
        """The memory of the largest stage where memory is short."""
        return max(self.least_training_mb, self.least_export_mb)


@dataclass(frozen=True)
class Room:
    """Free memory (None if the system does not report it) and free disk space of `folder`, in 10^6 bytes.

    The work folder of an earlier build of the same bundle counts as free, because it is reused.
    """

    folder: Path
    memory_mb: float | None
    disk_mb: float


def told(recipe: Recipe, tasks: Sequence[Task], header: GgufHeader | None, out: Path) -> dict[str, Any] | None:
    """What building `out` needs and what is free, as JSON values: whole MB, a `summary`, and `warnings`.

    None without a header. Raises OutOfSpaceError or IncompatibleError, with what would fit instead, if the build cannot
    work.
    """
    if header is None:
        return None
    needs, room = of_recipe(recipe, tasks, header), room_for(out)
    warnings = check(recipe, needs, room)
    figures = {
        "memory_mb": needs.memory_mb,
        **asdict(needs),
        "free_memory_mb": room.memory_mb,
        "free_disk_mb": room.disk_mb,
    }
    whole = {key: None if value is None else math.ceil(value) for key, value in figures.items()}
    return {"summary": describe(needs, room), **whole, "warnings": warnings}


def of_recipe(recipe: Recipe, tasks: Sequence[Task], header: GgufHeader) -> BuildNeeds:
    """What building `recipe` with these tasks needs, for the base with this header; a high estimate."""
    parameters = header.parameters
    whole_mb = parameters * _FLOAT / 1e6
    shape = BaseShape.of_header(header)
    bundle, others_mb = _bundle_mb(recipe, header, shape)
    chosen = [spec.method for spec in recipe.adapters.values()]
    trained = [methods.load(spec.name).trained_parameters(shape, spec.options) for spec in chosen]
    requantized = bases.quantization_of(recipe) is not None
    base_mb = _base_bytes(recipe, header) / 1e6
    # In the work folder: a requantized base, one after continued pretraining, and the trained parameters.
    kept = base_mb * (requantized + (recipe.domain is not None)) + sum(trained) * _FLOAT / 1e6
    formats = [backends.format_of(target) for target in recipe.targets]
    staged = bundle - base_mb * any(found.links_base for found in formats)
    at_a_time = (saved_states_mb(max(trained, default=0)), staged + bundle)
    least_mb, training_mb = _training_mb(recipe, tasks, shape)
    export_mb = max(found.export_mb(base_mb * 1e6, parameters, recipe.onnx.weights) for found in formats)
    return BuildNeeds(
        parameters=parameters,
        weights_mb=whole_mb,
        training_mb=training_mb,
        least_training_mb=least_mb,
        export_mb=whole_mb + export_mb,
        least_export_mb=export_mb,
        bundle_mb=bundle,
        disk_mb=kept + max(at_a_time),
        least_disk_mb=staged + bundle,
        others_mb=others_mb,
    )


def room_for(out: Path) -> Room:
    """The free memory and disk space for building `out`, which need not exist yet."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    work = out.with_name(f"{out.name}.work")
    left = sum(path.stat().st_size for path in _files(work))
    return Room(folder, machine.free_mb(), (shutil.disk_usage(folder).free + left) / 1e6)


def check(recipe: Recipe, needs: BuildNeeds, room: Room) -> list[str]:
    """Warnings if memory or disk may be too small for `needs`, each with the remedy.

    Raises OutOfSpaceError, IncompatibleError or UsageError, with what would fit instead, if they are too small.
    """
    _refuse_disk(recipe, needs, room)
    warnings = []
    is_mapped = room.memory_mb is not None and room.memory_mb < needs.export_mb
    disk_mb = needs.disk_mb + (needs.weights_mb if is_mapped else 0)
    if room.disk_mb < disk_mb:
        what = f"building takes up to {_mb(disk_mb)} of disk, and {room.folder} has {_mb(room.disk_mb)} free"
        warnings.append(f"{what}; {_disk_remedy(recipe, needs, disk_mb - room.disk_mb)}")
    limit_mb = recipe.training.memory_mb
    if limit_mb is not None and limit_mb < needs.least_training_mb:
        warnings.append(_refused_limit(limit_mb, needs))
    if room.memory_mb is None:
        return warnings
    if room.memory_mb < needs.weights_mb:
        message = (
            f"base {recipe.base!r} of {needs.parameters / 1e6:,.0f}M parameters takes at least {_mb(needs.weights_mb)} "
            f"of memory in float32, and {_mb(room.memory_mb)} are free"
        )
        raise IncompatibleError(message, _memory_remedy(room.memory_mb))
    if room.memory_mb < needs.least_memory_mb:
        part = "training" if needs.least_training_mb >= needs.least_export_mb else "export"
        what = f"{part} takes about {_mb(needs.least_memory_mb)} of memory, and {_mb(room.memory_mb)} are free"
        warnings.append(f"{what}; {_memory_remedy(room.memory_mb)}")
    return warnings


def describe(needs: BuildNeeds, room: Room) -> str:
    """What is needed and what is free, in one line."""
    free = "" if room.memory_mb is None else f" ({_mb(room.memory_mb)} free)"
    less = ""
    if needs.least_training_mb < needs.training_mb:
        less = f" ({_mb(needs.least_training_mb)} with the smallest forward passes)"
    return (
        f"memory about {_mb(needs.training_mb)} for training{less} and {_mb(needs.export_mb)} for export{free}; "
        f"disk up to {_mb(needs.disk_mb)}, the bundle {_mb(needs.bundle_mb)} of it ({_mb(room.disk_mb)} free)"
    )


def header_of(recipe: Recipe) -> GgufHeader | None:
    """The base's header, predicted for a folder; reads no weights and downloads nothing.

    None if the base must be downloaded first. Raises what `bases.describe` does.
    """
    return bases.describe(recipe)


def _refused_limit(limit_mb: int, needs: BuildNeeds) -> str:
    """A warning about a memory limit that is too small; UsageError if even the weights do not fit."""
    what = f"training.memory_mb is {limit_mb:,}, and training takes at least about {_mb(needs.least_training_mb)}"
    remedy = f"set it to {math.ceil(needs.least_training_mb):,} or more, or leave it out"
    # Weights in bf16 take half.
    if limit_mb < needs.weights_mb / 2:
        raise UsageError(what, remedy)
    return f"{what}; {remedy}"


def _refuse_disk(recipe: Recipe, needs: BuildNeeds, room: Room) -> None:
    if room.disk_mb >= needs.least_disk_mb:
        return
    message = (
        f"building takes at least {_mb(needs.least_disk_mb)} of disk, and {room.folder} has {_mb(room.disk_mb)} free"
    )
    raise OutOfSpaceError(message, _disk_remedy(recipe, needs, needs.least_disk_mb - room.disk_mb))


def _disk_remedy(recipe: Recipe, needs: BuildNeeds, missing_mb: float) -> str:
    less = ""
    if len(recipe.targets) > 1:
        less = f", or build targets: [{recipe.targets[0]}] alone, whose bundle is {_mb(needs.others_mb)} smaller"
    return f"free {_mb(math.ceil(missing_mb))} or choose another --out{less}"


def _memory_remedy(free_mb: float) -> str:
    most = (free_mb - PROCESS_MB) * 1e6 / _FLOAT / 1e6
    fits = f", or choose a base of at most {most:,.0f}M parameters" if most >= 1 else ""
    return f"close other programs{fits}"


def _training_mb(recipe: Recipe, tasks: Sequence[Task], shape: BaseShape) -> tuple[float, float]:
    """The memory of the largest training run: with the smallest forward passes, and with the largest useful ones."""
    needs = [
        training_need(
            shape,
            methods.load(task.spec.method.name),
            task.spec.method.options,
            longest_row=min(recipe.context_length, max(lengths)),
            batch_tokens=math.ceil(sum(lengths) / len(lengths) * task.training.batch_size),
            precision=_precision(task.training),
        )
        for task in tasks
        if (lengths := [_tokens(row, task.spec.system) for row in task.train])
    ]
    if recipe.domain is not None:
        window, training = recipe.domain.window or recipe.context_length, recipe.training.under(recipe.domain.training)
        method = recipe.domain.method
        sizes = {"longest_row": window, "batch_tokens": window * training.batch_size}
        kind = methods.load(method.name)
        needs.append(training_need(shape, kind, method.options, **sizes, precision=_precision(training)))
    least_mb, most_mb = max(need.least_mb for need in needs), max(need.planned_mb for need in needs)
    limit_mb = recipe.training.memory_mb
    return least_mb, most_mb if limit_mb is None else max(least_mb, min(most_mb, limit_mb))


def _precision(training: TrainingSpec) -> str:
    """`fp32` unless the recipe says otherwise: only torch knows which formats the hardware computes fast."""
    return "fp32" if training.precision == "auto" else training.precision


def _tokens(row: TaskRow, system: str | None) -> int:
    """A high estimate of the tokens of a row."""
    tools = None if row.tools is None else row.tools.text
    texts = (system, tools, row.text, row.completion, *(message["content"] for message in row.messages or ()))
    return math.ceil(sum(len(text) for text in texts if text) / _CHARACTERS)


def _bundle_mb(recipe: Recipe, header: GgufHeader, base: BaseShape) -> tuple[float, float]:
    """The size of the bundle, and the part that all formats but the first add."""
    base_bytes = _base_bytes(recipe, header)
    parameters = header.parameters
    weights, by_target = recipe.onnx.weights, []
    for target in recipe.targets:
        found = backends.format_of(target)
        size = found.base_bytes(base_bytes, parameters, weights)
        for spec in recipe.adapters.values():
            shape = shapes_in((target,), spec.method.name, spec.method.options, merged=spec.merged)[target]
            if shape == "merged":
                size += found.merged_bytes(parameters, weights)
            else:
                size += found.adapter_bytes(shipped_values(spec.method, shape, base), spec.dtype_in(target), shape)
        by_target.append(size / 1e6)
    return sum(by_target), sum(by_target[1:])


def _base_bytes(recipe: Recipe, header: GgufHeader) -> int:
    """The size of the base's GGUF file in the bundle; the board may choose a smaller one."""
    quantization = bases.quantization_of(recipe)
    return fit.needs_of_header(header, context_length=recipe.context_length, quantization=quantization).base_bytes


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, without following links; none if the folder does not exist."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _mb(value: float) -> str:
    return f"{math.ceil(value):,} MB"
