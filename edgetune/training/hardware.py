"""The processes and the device of a training, and the precision in which the device multiplies fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from edgetune_runtime.errors import UsageError

from edgetune.methods import Method
from edgetune.recipe.training import TrainingSpec

from .device import TorchReport, TrainingDevice, choose_device, may_have_gpu
from .device_memory import free_mb, total_mb
from .precision import precision_on, require_int8

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.float32}
"""The dtype in which the base is loaded for each precision."""


def processes() -> PartialState:
    """This process among those of the launcher; the first call sets the device, unless `use_device` has."""
    # By default accelerate assumes that several processes mean several GPUs, even on a machine without one.
    return PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))


def over_processes(values: Sequence[float], accelerator: Accelerator) -> Sequence[float]:
    """The sums of the values over all processes."""
    if accelerator.num_processes == 1:
        return values
    # In float64, which the GPUs of Apple silicon lack; but there training has a single process.
    totals = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    sums: list[float] = accelerator.reduce(totals, "sum").tolist()
    return sums


def use_device(key: str) -> TrainingDevice:
    """Make the trainings of this process run on the device of `key`, a value of `training.device`; returns the device.

    Each process of a launcher has its own GPU. Raises IncompatibleError if torch does not find the device, UsageError
    if several processes would share one.
    """
    reported = torch_report()
    name = choose_device(key, reported)
    state = PartialState(cpu=name == "cpu")
    if state.num_processes == 1:
        state.device = torch.device(name)
        if state.device.type == "cuda":
            torch.cuda.set_device(state.device)
    elif key not in ("auto", state.device.type):
        message = f"training.device is {key}, but {state.num_processes} processes train on {state.device.type}"
        raise UsageError(message, "set training.device: auto, or start a single process")
    device = device_of(state.device)
    is_missed = key == "auto" and device.kind == "cpu" and may_have_gpu()
    return replace(device, title=f"torch {reported.version} finds no GPU") if is_missed else device


def torch_report() -> TorchReport:
    """What torch reports of itself and this machine."""
    return TorchReport(
        torch.__version__,
        torch.backends.cuda.is_built(),  # type: ignore[no-untyped-call]
        torch.cuda.device_count() if torch.cuda.is_available() else 0,
        torch.backends.mps.is_available(),
    )


def device_of(device: torch.device) -> TrainingDevice:
    """The figures of torch's `device`, as they are now."""
    if device.type == "cuda":
        properties, is_rocm = torch.cuda.get_device_properties(device), torch.version.hip is not None
        # Older GPUs have bf16 too, but emulate its products: torch.cuda.is_bf16_supported() is true there.
        multiplies_bf16 = is_rocm or properties.major >= 8
        return TrainingDevice(str(device), properties.name, free_mb(device), total_mb(device), multiplies_bf16)
    if device.type == "mps":
        # torch does not tell the chips that multiply bf16 from those that emulate it.
        return TrainingDevice(str(device), "Apple silicon", free_mb(device), total_mb(device))
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return TrainingDevice(str(device), multiplies_bf16=fast)


def precision_of(training: TrainingSpec, method: Method[Any]) -> str:
    """The precision that the recipe sets; for `auto`, `bf16` if the device multiplies it fast, else `fp32`.

    UsageError for int8 if the hardware or the method does not support it.
    """
    device = device_of(processes().device)
    if training.precision == "int8":
        require_int8(method, device.kind)
    return precision_on(device, training)
