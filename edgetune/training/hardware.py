"""What training runs on: its processes and device, and the precision that the device multiplies fast."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState

from edgetune.methods import Method
from edgetune.recipe.parts import TrainingSpec

from .precision import require_int8

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.float32}
"""The dtype in which the base is loaded for each precision."""


def processes() -> PartialState:
    """This process among those of the launcher; the first call sets the device of all training."""
    # By default accelerate assumes that several processes mean several GPUs, even on a machine without one.
    return PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))


def precision_of(training: TrainingSpec, method: Method[Any]) -> str:
    """The precision that the recipe sets; for `auto`, `bf16` if the hardware multiplies it fast, else `fp32`.

    UsageError for int8 if the hardware or the method does not support it.
    """
    device = processes().device
    if training.precision == "int8":
        require_int8(method, device.type)
    if training.precision != "auto":
        return training.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    return "fp32"
