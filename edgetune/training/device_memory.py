"""Memory of the training device: what is free, what this process uses of it, and the peak, in 10^6 bytes.

That of a GPU is what torch's allocator reports; what it has freed and keeps counts as free.
"""

from __future__ import annotations

import math

import torch
from edgetune_runtime.threads import machine


def total_mb(device: torch.device) -> float:
    """The memory of a GPU; of Apple silicon, the part of the machine's memory that its GPU may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 1e6
    return torch.mps.recommended_max_memory() / 1e6


def free_mb(device: torch.device) -> float:
    """Memory that this process can still allocate; infinite if the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / 1e6
    if device.type == "mps":
        return (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()) / 1e6
    free = machine.free_mb()
    return math.inf if free is None else free


def used_mb(device: torch.device) -> float:
    """Memory that this process uses: that of a GPU, else resident memory; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    if device.type == "mps":
        return torch.mps.current_allocated_memory() / 1e6
    return machine.resident_mb() or 0.0


def peak_mb(device: torch.device) -> float:
    """Peak memory so far: that of a GPU, else of this process; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if device.type == "mps":
        # Metal reports no peak, but torch returns little of what it has allocated.
        return torch.mps.driver_allocated_memory() / 1e6
    peak = machine.peak_mb()
    return math.nan if peak is None else peak
