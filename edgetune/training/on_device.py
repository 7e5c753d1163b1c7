"""Takes a base back from the training device, and reports a device that fails as one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from edgetune_runtime.errors import EdgetuneError
from edgetune_runtime.wording import first_line, shortened

_RESUME = "run the same command to resume"
# The allocators of the CPU and of Metal, and CUDA's libraries, raise plain RuntimeErrors.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED")


@contextmanager
def on_device(base: torch.nn.Module, device: torch.device, name: str) -> Iterator[None]:
    """Run the training `name` in the block, which may move `base` to `device`; it is on the CPU afterwards.

    All else runs there, and so each training begins with the same values. A device that runs out of memory, or that
    fails or disappears, is an EdgetuneError.
    """
    before = sys.exception()
    try:
        try:
            yield
        finally:
            base.to("cpu")
    except RuntimeError as error:
        # A lost device fails again when the base is taken back from it: the first error says what happened.
        failures = (failure_of(each, device, name) for each in reversed(_since(before, error)))
        if failure := next(filter(None, failures), None):
            raise failure from error
        raise


def _since(before: BaseException | None, error: BaseException | None) -> list[RuntimeError]:
    """An error and the RuntimeErrors that it came after, the last first, without those from `before` the block."""
    chain = []
    while error is not None and error is not before:
        if isinstance(error, RuntimeError):
            chain.append(error)
        error = error.__context__
    return chain


def failure_of(error: RuntimeError, device: torch.device, name: str) -> EdgetuneError | None:
    """What to report of an error of the device in the training `name`; None if it is another error."""
    if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)):
        other = "" if device.type == "cpu" else ", or training.device: cpu"
        remedy = f"close other programs that use it, or set a lower training.memory_mb{other}; {_RESUME}"
        return EdgetuneError(f"training {name} ran out of memory on {device}", remedy)
    if isinstance(error, torch.AcceleratorError):
        message = f"training {name} lost {device}: {shortened(first_line(error))}"
        return EdgetuneError(message, f"check the device and its driver, then {_RESUME}")
    return None
