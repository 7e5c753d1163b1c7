"""Memory, disk space and time that a build needs, and what this machine has free; MB are 10^6 bytes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgetune_export import backends
from edgetune_export.architectures.shape import BaseShape
from edgetune_export.backends.format import IMPORTS_MB, PROCESS_MB
from edgetune_runtime.errors import IncompatibleError, OutOfSpaceError, UsageError
from edgetune_runtime.formats.gguf_sizes import vocabulary
from edgetune_runtime.threads import machine
from edgetune_runtime.threads.machine import instructions

from edgetune import methods
from edgetune.common.work_folder import work_folder
from edgetune.recipe.model import Recipe
from edgetune.recipe.training import TrainingSpec
from edgetune.tasks.estimate import beginning, beginning_tokens, estimated_tokens
from edgetune.tasks.task import Task
from edgetune.training.device import CPU, TrainingDevice
from edgetune.training.duration import TrainingTime, predicted_time
from edgetune.training.memory import saved_states_mb, training_need
from edgetune.training.precision import precision_on
from edgetune.training.schedule import SHARED_COST, Schedule

from .on_device import domain_grid_types
from .quantization import MAX_TOKENS
from .records import BuildNeeds, BuildPlan, NeedsReport, Room, RowsPlan, mb

_FLOAT_BYTES = 4
# Of weights in float32, those in bf16 take this share.
_BF16_SHARE = 0.5
# Of SmolLM2's chat template in a row with a system prompt, less what `RowsPlan.mean_tokens` is too high by.
_ROW_CORRECTION_TOKENS = 6


def report(plan: BuildPlan, base: BaseShape, room: Room) -> NeedsReport:
    """What the build needs and what is free.

    Raises OutOfSpaceError or IncompatibleError, with what would fit instead, if the build cannot work.
    """
    needs = needs_of(plan, base, room.device)
    return NeedsReport(needs, room, tuple(check(plan.recipe, needs, room)), training_time(plan, base, room))


def needs_of(plan: BuildPlan, base: BaseShape, device: TrainingDevice) -> BuildNeeds:
    """What the build, whose adapters have `rows`, needs if it trains on `device`; a high estimate."""
    recipe, parameters = plan.recipe, base.parameters
    weights_mb, base_mb = base.weights_mb, (plan.base.gguf_bytes or 0) / 1e6
    formats = {target: backends.format_of(target) for target in recipe.targets}
    options = recipe.format_options
    by_target = [
        file_format.base_bytes(plan.base.bytes_in(target), parameters, options) / 1e6
        + sum(adapter.bytes_by_format.get(target, 0) for adapter in plan.adapters.values()) / 1e6
        for target, file_format in formats.items()
    ]
    # Others are in the bundle already.
    new = [adapter for adapter in plan.adapters.values() if adapter.rows is not None]
    trained = [adapter.trainable_parameters or 0 for adapter in new]
    # In the work folder: a requantized base, one after continued pretraining, and the trained parameters.
    copies = bool(plan.base.quantization or plan.base.candidates) + (recipe.domain is not None)
    folds = [adapter.spec.confidence_folds or 0 for adapter in new]
    trained_parameters = sum((1 + count) * each for count, each in zip(folds, trained, strict=True))
    folds_mb = sum(count * sum(each.bytes_by_format.values()) for count, each in zip(folds, new, strict=True)) / 1e6
    work_mb = copies * base_mb + trained_parameters * _FLOAT_BYTES / 1e6
    bundle_mb = sum(by_target)
    staged_mb = bundle_mb + 2 * folds_mb - base_mb * any(item.links_base for item in formats.values())
    # Not at the same time: training has ended before the bundle is staged.
    temporary_mb = max(saved_states_mb(max(trained, default=0)), staged_mb + bundle_mb, _measuring_mb(plan, weights_mb))
    min_mb, training_mb = _training_mb(plan, base, device)
    export_mb = max(item.export_mb(plan.base.bytes_in(target), parameters, options) for target, item in formats.items())
    return BuildNeeds(
        parameters=parameters,
        weights_mb=weights_mb,
        training_mb=training_mb,
        min_training_mb=min_mb,
        export_mb=weights_mb + export_mb,
        min_export_mb=export_mb,
        bundle_mb=bundle_mb,
        disk_mb=work_mb + temporary_mb,
        min_disk_mb=staged_mb + bundle_mb,
        extra_formats_mb=sum(by_target[1:]),
    )


def plan_rows(task: Task, training: TrainingSpec, added_tokens: int) -> RowsPlan:
    """The data of a task: its numbers of rows, their lengths and the optimizer steps.

    `added_tokens` are those of a row besides its texts (see `TaskType`).
    """
    rows, system = task.trained_rows, task.spec.system
    lengths = [estimated_tokens(row, system) for row in rows]
    steps = Schedule(len(lengths), training).steps if lengths else 0
    mean = sum(lengths) / max(1, len(lengths))
    shared = beginning_tokens(rows[0], system) if len({beginning(row, system) for row in rows}) == 1 else 0
    longest = added_tokens + max(lengths) if lengths else 0
    return RowsPlan(len(lengths), len(task.validation), longest, mean, shared, steps)


def room_for(out: Path, device: TrainingDevice = CPU) -> Room:
    """What this machine has for building `out`, which need not exist yet, with training on `device`."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    left = sum(path.stat().st_size for path in _files(work_folder(out)))
    disk_mb = (shutil.disk_usage(folder).free + left) / 1e6
    return Room(folder, machine.free_mb(), disk_mb, device, machine.usable_cores(), frozenset(instructions()))


def training_time(plan: BuildPlan, base: BaseShape, room: Room) -> TrainingTime | None:
    """The time of all trainings to their last step on the machine of `room`.

    None where no speed was measured: on GPUs and processors without AVX2, for methods that train the base's weights,
    and with continued pretraining. The lengths of rows are estimated; activation checkpointing, where memory is short,
    takes longer.
    """
    trained = [
        (adapter, adapter.rows) for adapter in plan.adapters.values() if adapter.rows is not None and adapter.rows.train
    ]
    is_measured = room.device.kind == "cpu" and "avx2" in room.instruction_sets and plan.recipe.domain is None
    if not is_measured or any(methods.load(adapter.method).trains_base for adapter, _ in trained):
        return None
    # Those for which torch multiplies bf16 fast: see `hardware.device_of`.
    cpu = replace(CPU, multiplies_bf16=not room.instruction_sets.isdisjoint({"avx512-bf16", "amx-int8"}))
    weights, trainings = base.linear_weights + base.hidden * base.vocabulary, []
    for adapter, rows in trained:
        own = rows.mean_tokens + _ROW_CORRECTION_TOKENS - rows.shared_tokens * (1 - SHARED_COST)
        tokens = rows.steps * (rows.shared_tokens + adapter.training.batch_size * own)
        trainings.append((precision_on(cpu, adapter.training), adapter.trainings * weights * tokens))
    return predicted_time(trainings, room.cores)


def check(recipe: Recipe, needs: BuildNeeds, room: Room) -> list[str]:
    """Warnings if memory or disk may be too small for `needs`, each with the remedy.

    Raises OutOfSpaceError, IncompatibleError or UsageError, with what would fit instead, if they are too small.
    """
    _refuse_disk(recipe, needs, room)
    warnings = []
    is_mapped = room.memory_mb is not None and room.memory_mb < needs.export_mb
    disk_mb = needs.disk_mb + (needs.weights_mb if is_mapped else 0)
    if room.disk_mb < disk_mb:
        message = f"building takes up to {mb(disk_mb)} of disk, and {room.folder} has {mb(room.disk_mb)} free"
        warnings.append(f"{message}; {_disk_remedy(recipe, needs, disk_mb - room.disk_mb)}")
    limit_mb = recipe.training.memory_mb
    if limit_mb is not None and limit_mb < needs.min_training_mb:
        warnings.append(_refused_limit(limit_mb, needs))
    warnings += _device_warnings(recipe, needs, room.device)
    if room.memory_mb is None:
        return warnings
    if room.memory_mb < needs.weights_mb:
        message = (
            f"base {recipe.base!r} of {needs.parameters / 1e6:,.0f}M parameters takes at least {mb(needs.weights_mb)} "
            f"of memory in float32, and {mb(room.memory_mb)} are free"
        )
        raise IncompatibleError(message, _memory_remedy(needs, room.memory_mb))
    stages = {"export": needs.min_export_mb}
    if not room.device.has_memory:
        stages["training"] = needs.min_training_mb
    part = max(stages, key=lambda stage: stages[stage])
    if room.memory_mb < stages[part]:
        message = f"{part} takes about {mb(stages[part])} of memory, and {mb(room.memory_mb)} are free"
        warnings.append(f"{message}; {_memory_remedy(needs, room.memory_mb)}")
    return warnings


def _device_warnings(recipe: Recipe, needs: BuildNeeds, device: TrainingDevice) -> list[str]:
    """A warning if a GPU has too little free memory for training; IncompatibleError if it cannot hold the weights."""
    if device.free_mb is None or device.total_mb is None:
        return []
    remedy = "set training.device: cpu, or choose a smaller base"
    if device.total_mb < needs.weights_mb * _BF16_SHARE:
        message = (
            f"base {recipe.base!r} of {needs.parameters / 1e6:,.0f}M parameters takes at least "
            f"{mb(needs.weights_mb * _BF16_SHARE)} of memory on {device.name} ({device.title}), which has "
            f"{mb(device.total_mb)}"
        )
        raise IncompatibleError(message, remedy)
    if device.free_mb < needs.min_training_mb:
        problem = f"training takes about {mb(needs.min_training_mb)} of memory on {device}"
        return [f"{problem}; close other programs that use it, {remedy}"]
    return []


def _refused_limit(limit_mb: int, needs: BuildNeeds) -> str:
    """A warning about a memory limit that is too small; UsageError if even the weights do not fit."""
    problem = f"training.memory_mb is {limit_mb:,}, and training takes at least about {mb(needs.min_training_mb)}"
    remedy = f"set it to {math.ceil(needs.min_training_mb):,} or more, or leave it out"
    if limit_mb < needs.weights_mb * _BF16_SHARE:
        raise UsageError(problem, remedy)
    return f"{problem}; {remedy}"


def _refuse_disk(recipe: Recipe, needs: BuildNeeds, room: Room) -> None:
    if room.disk_mb >= needs.min_disk_mb:
        return
    message = f"building takes at least {mb(needs.min_disk_mb)} of disk, and {room.folder} has {mb(room.disk_mb)} free"
    raise OutOfSpaceError(message, _disk_remedy(recipe, needs, needs.min_disk_mb - room.disk_mb))


def _disk_remedy(recipe: Recipe, needs: BuildNeeds, missing_mb: float) -> str:
    remedy = f"free {mb(math.ceil(missing_mb))} or choose another folder"
    if len(recipe.targets) == 1:
        return remedy
    smaller = f"whose bundle is {mb(needs.extra_formats_mb)} smaller"
    return f"{remedy}, or build targets: [{recipe.targets[0]}] alone, {smaller}"


def _memory_remedy(needs: BuildNeeds, free_mb: float) -> str:
    max_millions = (free_mb - PROCESS_MB) / _FLOAT_BYTES
    if max_millions < 1:
        return "close other programs"
    if needs.parameters < max_millions * 1e6:
        return "close other programs, or use a smaller base, a lower r or fewer target_modules"
    return f"close other programs, or choose a base of at most {max_millions:,.0f}M parameters"


def _measuring_mb(plan: BuildPlan, weights_mb: float) -> float:
    """Disk for measuring quantizations: the base before quantization and in the largest one, and logits in float32."""
    if not plan.base.candidates or plan.source is None or plan.source.header is None:
        return 0.0
    logits_mb = MAX_TOKENS * vocabulary(plan.source.header) * _FLOAT_BYTES / 1e6
    return weights_mb * plan.source.is_folder + plan.base.candidates[0].bytes / 1e6 + logits_mb


def _training_mb(plan: BuildPlan, base: BaseShape, device: TrainingDevice) -> tuple[float, float]:
    """The memory of the largest training run: with the smallest forward passes, and with the largest useful ones."""
    recipe = plan.recipe
    process_mb = 0.0 if device.has_memory else IMPORTS_MB
    needs = []
    for adapter in plan.adapters.values():
        if adapter.rows is None or not adapter.rows.train or adapter.trained is None:
            continue
        needs.append(
            training_need(
                methods.load(adapter.method),
                adapter.options,
                adapter.trained,
                longest_row=min(recipe.context_length, adapter.rows.longest_tokens),
                batch_tokens=math.ceil(adapter.rows.mean_tokens * adapter.training.batch_size),
                precision=_precision(adapter.training, device),
                process_mb=process_mb,
                on_grid=adapter.on_grid,
            )
        )
    if recipe.domain is not None:
        assert plan.source is not None and plan.source.header is not None
        window, training = recipe.domain.window or recipe.context_length, recipe.training.under(recipe.domain.training)
        method = recipe.domain.method
        loaded = methods.load(method.name)
        trained = loaded.trained(base, method.options)
        needs.append(
            training_need(
                loaded,
                method.options,
                trained,
                longest_row=window,
                batch_tokens=window * training.batch_size,
                precision=_precision(training, device),
                process_mb=process_mb,
                on_grid=bool(domain_grid_types(recipe, plan.source.header, plan.base.quantization)),
            )
        )
    min_mb, max_mb = max(need.min_mb for need in needs), max(need.max_mb for need in needs)
    limit_mb = recipe.training.memory_mb
    return min_mb, max_mb if limit_mb is None else max(min_mb, min(max_mb, limit_mb))


def _precision(training: TrainingSpec, device: TrainingDevice) -> str:
    """The precision on a GPU; on the CPU fp32 for `auto`: only torch knows what it computes fast, and is not asked."""
    return precision_on(device if device.has_memory else CPU, training)


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, without following links; none if the folder does not exist."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
