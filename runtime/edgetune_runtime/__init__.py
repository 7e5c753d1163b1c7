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
    MissingLibraryError,
    NotFoundError,
    OutOfSpaceError,
    PromptTooLongError,
    UnreachableError,
    UnsureError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from .answer_log.log import AnswerLog
    from .bundle import (
        AdapterEntry,
        BaseEntry,
        ConfidenceCurve,
        FileEntry,
        GoldenAnswer,
        Manifest,
        RoutedCall,
        RouterEntry,
        Scope,
        UnsureRule,
    )
    from .decoding.logprobs import TokenLogprob
    from .decoding.output import OutputSpec
    from .events import Event
    from .inference.adapter_changes import AdapterChanges
    from .inference.adapter_choice import Adapters
    from .inference.answer import Answer, Stream, Timings
    from .inference.async_stream import AsyncStream
    from .inference.asynchronous import AsyncRuntime, AsyncSession
    from .inference.classification import Classification
    from .inference.deferring import DeferTo
    from .inference.opening_options import RuntimeOptions
    from .inference.options import AnswerOptions, SamplingOptions
    from .inference.routing.router import Route
    from .inference.runtime import Runtime
    from .inference.scoring import NegativeLogLikelihood
    from .inference.session import Carry, Session
    from .serving.classifier import Embedding
    from .text.chat import Message, Prompt
    from .text.sampling import Sampling
    from .tools.calls import ToolCall
    from .tools.definitions import Tools

__version__ = "0.1.0"

__all__ = [
    "AdapterChanges",
    "AdapterEntry",
    "Adapters",
    "Answer",
    "AnswerLog",
    "AnswerOptions",
    "AsyncRuntime",
    "AsyncSession",
    "AsyncStream",
    "BaseEntry",
    "BusyError",
    "CancelledError",
    "Carry",
    "Classification",
    "ConfidenceCurve",
    "DeferTo",
    "EdgetuneError",
    "Embedding",
    "Event",
    "FileEntry",
    "GoldenAnswer",
    "IncompatibleError",
    "Manifest",
    "Message",
    "MissingLibraryError",
    "NegativeLogLikelihood",
    "NotFoundError",
    "OutOfSpaceError",
    "OutputSpec",
    "Prompt",
    "PromptTooLongError",
    "Route",
    "RoutedCall",
    "RouterEntry",
    "Runtime",
    "RuntimeOptions",
    "Sampling",
    "SamplingOptions",
    "Scope",
    "Session",
    "Stream",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "Tools",
    "UnreachableError",
    "UnsureError",
    "UnsureRule",
    "UsageError",
    "VerificationError",
    "__version__",
]

# Log nothing until the app sets up logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# These import numpy, which takes longer than everything else together, so they are loaded on first use.
_LAZY = {
    "answer_log.log": "AnswerLog",
    "bundle": (
        "AdapterEntry BaseEntry ConfidenceCurve FileEntry GoldenAnswer Manifest RoutedCall RouterEntry Scope UnsureRule"
    ),
    "decoding.logprobs": "TokenLogprob",
    "decoding.output": "OutputSpec",
    "events": "Event",
    "inference.adapter_changes": "AdapterChanges",
    "inference.answer": "Answer Stream Timings",
    "inference.async_stream": "AsyncStream",
    "inference.asynchronous": "AsyncRuntime AsyncSession",
    "inference.deferring": "DeferTo",
    "inference.adapter_choice": "Adapters",
    "inference.opening_options": "RuntimeOptions",
    "inference.options": "AnswerOptions SamplingOptions",
    "inference.routing.router": "Route",
    "inference.runtime": "Runtime",
    "inference.classification": "Classification",
    "inference.scoring": "NegativeLogLikelihood",
    "inference.session": "Carry Session",
    "serving.classifier": "Embedding",
    "text.chat": "Message Prompt",
    "text.sampling": "Sampling",
    "tools.calls": "ToolCall",
    "tools.definitions": "Tools",
}
_MODULES = {name: module for module, names in _LAZY.items() for name in names.split()}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
