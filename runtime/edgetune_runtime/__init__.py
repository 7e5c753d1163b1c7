"""Run a bundle: one quantized base in memory, adapters that are switched by pointer, no torch.

with Runtime.open("build/smart-home") as runtime:
    answer = runtime.generate("turn off the lamp in the hall", adapter="command")
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    BusyError,
    CancelledError,
    EdgetuneError,
    IncompatibleError,
    NotFoundError,
    OutOfSpaceError,
    PromptTooLongError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from .async_stream import AsyncStream
    from .asynchronous import AsyncRuntime, AsyncSession
    from .decoding.logprobs import TokenLogprob
    from .events import Event
    from .generation import Answer, Stream, Timings
    from .runtime import Runtime
    from .session import Session
    from .text.sampling import Sampling
    from .tools.calls import ToolCall

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AsyncRuntime",
    "AsyncSession",
    "AsyncStream",
    "BusyError",
    "CancelledError",
    "EdgetuneError",
    "Event",
    "IncompatibleError",
    "NotFoundError",
    "OutOfSpaceError",
    "PromptTooLongError",
    "Runtime",
    "Sampling",
    "Session",
    "Stream",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "UsageError",
    "VerificationError",
    "__version__",
]

# Log nothing until the app sets up logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# These import numpy, which takes longer than everything else together, so they are loaded on first use.
_LAZY = {
    "Answer": "generation",
    "AsyncRuntime": "asynchronous",
    "AsyncSession": "asynchronous",
    "AsyncStream": "async_stream",
    "Event": "events",
    "Stream": "generation",
    "Timings": "generation",
    "TokenLogprob": "decoding.logprobs",
    "Runtime": "runtime",
    "Sampling": "text.sampling",
    "Session": "session",
    "ToolCall": "tools.calls",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
