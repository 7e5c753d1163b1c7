"""The device that training runs on: its figures, and how it is chosen from what torch reports. Needs no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError

_KEY = "training.device"
_OR_AUTO = f"or set {_KEY}: auto"
# What the drivers of NVIDIA and AMD, and WSL, make.
_DRIVERS = ("dev/nvidiactl", "dev/kfd", "dev/dxg")


@dataclass(frozen=True)
class TrainingDevice:
    """A device by torch's name, such as `cuda:0`, with the maker's name for it, or why it was chosen, as `title`.

    `free_mb` and `total_mb` are its own memory in 10^6 bytes; None for the CPU, which has that of the machine.
    `multiplies_bf16`: bf16 is faster than fp32 on it, as far as this is known.
    """

    name: str
    title: str = ""
    free_mb: float | None = None
    total_mb: float | None = None
    multiplies_bf16: bool = False

    @property
    def kind(self) -> str:
        """Its type in torch: cpu, cuda or mps."""
        return self.name.partition(":")[0]

    @property
    def has_memory(self) -> bool:
        """Whether it has memory of its own."""
        return self.total_mb is not None

    def __str__(self) -> str:
        free = "" if self.free_mb is None else f"{self.free_mb:,.0f} MB free"
        details = ", ".join(part for part in (self.title, free) if part)
        return f"{self.name} ({details})" if details else self.name


CPU = TrainingDevice("cpu")


@dataclass(frozen=True)
class TorchReport:
    """What torch reports: its version, whether it was built with CUDA (or ROCm, which torch calls CUDA too), the number
    of such GPUs that it finds, and whether it finds the GPU of Apple silicon."""

    version: str
    has_cuda: bool = False
    cuda_devices: int = 0
    has_mps: bool = False


def may_have_gpu(root: Path = Path("/")) -> bool:
    """Whether torch might find a GPU; if not, asking it, which takes seconds to import, is needless."""
    return sys.platform == "darwin" or any((root / driver).exists() for driver in _DRIVERS)


def choose_device(key: str, torch: TorchReport) -> str:
    """Torch's name of the device for `key`, a value of `training.device`; auto is the first GPU if there is one.

    Raises IncompatibleError if torch does not find the device.
    """
    kind, _, number = key.partition(":")
    if kind == "auto":
        return "cuda:0" if torch.cuda_devices else "mps" if torch.has_mps else "cpu"
    if kind == "mps" and not torch.has_mps:
        message = f"{_KEY} is mps, but torch {torch.version} finds no GPU of Apple silicon"
        raise IncompatibleError(message, f"run on such a Mac with macOS 14 or newer, {_OR_AUTO}")
    if kind == "cuda":
        return _cuda_device(key, int(number or 0), torch)
    return kind


def _cuda_device(key: str, index: int, torch: TorchReport) -> str:
    if not torch.has_cuda:
        message = f"{_KEY} is {key}, but torch {torch.version} is built without CUDA"
        raise IncompatibleError(message, f"install a torch build with CUDA, {_OR_AUTO}")
    if not torch.cuda_devices:
        message = f"{_KEY} is {key}, but torch {torch.version} finds no GPU"
        raise IncompatibleError(message, f"check that nvidia-smi (or rocm-smi) lists it, {_OR_AUTO}")
    if index >= torch.cuda_devices:
        names = ", ".join(f"cuda:{number}" for number in range(torch.cuda_devices))
        raise IncompatibleError(f"{_KEY} is {key}, but torch finds no such GPU", f"use {names}, {_OR_AUTO}")
    return f"cuda:{index}"
