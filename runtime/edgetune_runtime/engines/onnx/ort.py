"""Calls of onnxruntime that load the library and open sessions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edgetune_runtime.engines.base import StepStopped
from edgetune_runtime.errors import IncompatibleError, VerificationError, importing
from edgetune_runtime.wording import COPY_BUNDLE_AGAIN, ONNX_NEEDS, shortened

OLDEST = (1, 31)
"""The version that onnxruntime-genai, whose builder makes the graphs, needs. Older operators may lack 8-bit weights."""

_SPIN_US = 20
"""How long a thread of onnxruntime spins for work before it sleeps, in microseconds.

The default is much longer, which is no faster on an idle machine. With as many busy processes as cores, this value is
1.5 times as fast as the default. Not spinning at all costs a quarter of the speed on an idle machine.
"""

_LOG = logging.getLogger("edgetune_runtime.onnxruntime")
_INFORMATION, _WARNING, _FATAL = 1, 2, 4
_LEVELS = (logging.DEBUG, logging.DEBUG, logging.WARNING, logging.ERROR, logging.CRITICAL)
"""The levels for onnxruntime's severities 0 to 4. It logs 70 info lines per session, so they become debug messages."""
_EXPECTED = "appears in graph inputs and will not be treated as constant value/weight"
"""For each input with a default, such as the slots of adapters, whose default is empty."""


@cache
def library() -> Any:  # noqa: ANN401 - a module without types
    """The onnxruntime module, which logs to `logging`; IncompatibleError when it is missing or too old.

    Since 1.29 it sends figures of models and the machine to Microsoft unless ORT_DISABLE_TELEMETRY is set before it is
    imported; here it is, unless the user has set it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with importing(*ONNX_NEEDS):
        import onnxruntime  # noqa: PLC0415 - heavy and optional
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        message = f"onnxruntime {version} is too old, {oldest} or newer is needed"
        raise IncompatibleError(message, f"run: pip install --upgrade {ONNX_NEEDS[1]}")
    if _has_callback(onnxruntime):
        onnxruntime.set_default_logger_callback(_log, _WARNING)
    else:
        # Without a callback it writes to standard error.
        onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def library_version() -> str:
    """onnxruntime and its version."""
    return f"onnxruntime {library().__version__}"


def _has_callback(ort: Any) -> bool:  # noqa: ANN401 - as above; onnxruntime 1.31 has none
    return hasattr(ort, "set_default_logger_callback")


def _log(severity: int, _category: str, _session: str, place: str, message: str) -> None:
    _LOG.log(logging.DEBUG if _EXPECTED in message else _LEVELS[severity], "%s: %s", place, message)


@contextmanager
def graph_errors() -> Iterator[None]:
    """Raise VerificationError for what onnxruntime raises of a graph: RuntimeError, and classes of its own."""
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions have no other common base class
        reason = shortened(str(error))
        raise VerificationError(f"the graph of the base fails: {reason}", COPY_BUNDLE_AGAIN) from error


def open_session(path: Path, threads: int) -> Any:  # noqa: ANN401 - an InferenceSession
    """Load a graph that `read_onnx` has checked; VerificationError if onnxruntime refuses the graph."""
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The arena grows in powers of two and never shrinks: 14 MB more for SmolLM2-135M, and no faster.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = _severity(ort)
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    # KleidiAI rounds a whole row of activations to 8 bits with one scale, not each 32 values as on x86, where bundles
    # are checked: as a Cortex-A76, the KL to exact activations was 3e-2, and 4e-3 without it.
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no other common base class
        reason = shortened(str(error))
        raise VerificationError(f"onnxruntime cannot load {path}: {reason}", "build the bundle again") from error


def _severity(ort: Any) -> int:  # noqa: ANN401 - as above
    """The lowest severity that a session logs; fixed when the session is opened."""
    if not _has_callback(ort):
        return _FATAL
    return _INFORMATION if _LOG.isEnabledFor(logging.DEBUG) else _WARNING


def run_options() -> Any:  # noqa: ANN401 - a RunOptions
    """Options of a run that another thread can stop by setting `terminate`, which is then not logged."""
    options = library().RunOptions()
    options.log_severity_level = _FATAL
    return options


def run_binding(session: Any, io: Any, options: Any) -> None:  # noqa: ANN401 - as above
    """Compute a step; StepStopped if another thread stopped it through the options, VerificationError if it fails."""
    try:
        with graph_errors():
            session.run_with_iobinding(io, options)
    except VerificationError as error:
        if options.terminate:
            raise StepStopped from error
        raise
