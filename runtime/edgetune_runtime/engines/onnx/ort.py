"""onnxruntime's library in, its sessions and adapter files out: what every call into onnxruntime shares."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_runtime.errors import IncompatibleError, VerificationError

OLDEST = (1, 31)
"""What onnxruntime-genai, whose builder makes the graphs, asks for; older operators may lack 8 bits a weight."""

_SPIN_US = 20
"""How long a thread of onnxruntime's waits for work before it leaves its core to others, in microseconds.

By itself it spins for much longer, which is no faster on a quiet machine; with as many busy processes as cores this is
1.5 times as fast, and not to spin at all costs a quarter of the speed on a quiet one.
"""

_LOG = logging.getLogger("edgetune_runtime.onnxruntime")
_INFORMATION, _WARNING, _FATAL = 1, 2, 4
_LEVELS = (logging.DEBUG, logging.DEBUG, logging.WARNING, logging.ERROR, logging.CRITICAL)
"""Of onnxruntime's severities from 0 on. What it takes for information is 70 lines per session."""

_INSTALL = 'run: pip install --upgrade "edgetune-runtime[onnx]"'


@cache
def library() -> Any:  # noqa: ANN401 - a module without types
    """The onnxruntime module, which logs to `logging`; IncompatibleError when it is missing or too old."""
    try:
        import onnxruntime  # noqa: PLC0415 - heavy and optional
    except ImportError as error:
        raise IncompatibleError("ONNX bundles need onnxruntime, which is not installed", _INSTALL) from error
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise IncompatibleError(f"onnxruntime {version} is too old, {oldest} or newer is needed", _INSTALL)
    if _has_callback(onnxruntime):
        onnxruntime.set_default_logger_callback(_log, _WARNING)
    else:
        # It would write to standard error.
        onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def _has_callback(ort: Any) -> bool:  # noqa: ANN401 - as above; onnxruntime 1.31 has none
    return hasattr(ort, "set_default_logger_callback")


def _log(severity: int, _category: str, _session: str, place: str, message: str) -> None:
    _LOG.log(_LEVELS[severity], "%s: %s", place, message)


def open_session(path: Path, threads: int) -> Any:  # noqa: ANN401 - an InferenceSession
    """Load a graph that `read_onnx` has checked; VerificationError if onnxruntime refuses it."""
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _severity(ort)
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, which share no other base
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(f"onnxruntime cannot load {path}: {reason}", "build the bundle again") from error


def _severity(ort: Any) -> int:  # noqa: ANN401 - as above
    """From which severity on a session logs; looked up once, as a session keeps it."""
    if not _has_callback(ort):
        return _FATAL
    return _INFORMATION if _LOG.isEnabledFor(logging.DEBUG) else _WARNING


def run_options() -> Any:  # noqa: ANN401 - a RunOptions
    """Options of a run that can be ended by another thread, which sets `terminate`, without a word in the log."""
    options = library().RunOptions()
    options.log_severity_level = _FATAL
    return options


def adapter_arrays(path: Path, name: str) -> tuple[dict[str, NDArray[np.generic]], int]:
    """The tensors of an `.onnx_adapter` file and the version of the model that it was made for."""
    ort = library()
    try:
        adapter = ort.AdapterFormat.read_adapter(str(path))
        # The values are views of the adapter's memory, which is freed with it.
        arrays = {key: np.array(value.numpy()) for key, value in adapter.get_parameters().items()}
        return arrays, int(adapter.get_model_version())
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(f"adapter {name!r} is not an .onnx_adapter file: {reason}", "build it again") from error
