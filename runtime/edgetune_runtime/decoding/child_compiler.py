"""Compiles output constraints that may be expensive in a child process first, with limits of time and memory."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from edgetune_runtime.errors import BusyError
from edgetune_runtime.limits import no_limits
from edgetune_runtime.processes.child_process import has_python, run

from .single_flight import SingleFlightCache

MAX_CPU_S = 2
MAX_MB = 64
TOO_EXPENSIVE = "takes too long or too much memory"
_MAX_S = 20.0
"""Where other processes have the cores, CPU time takes longer."""
_CHEAP_CHARACTERS = 8192
_MAY_BE_EXPENSIVE = ("multipleOf", "allOf", '"pattern', r"\\u")
"""llguidance limits its automata by states, but not what it does to see whether parts that must all hold exclude each
other, or to count in numbers: the integers of `multipleOf: 999983` take 7 s and 400 MB. The quote leaves out the
`whitespace_pattern` that every schema gets, and an escape in the `%json` of a grammar may hide such a word."""
_PROGRAM = Path(__file__).with_name("child_compiler_main.py")

_LOG = logging.getLogger(__name__)


_reasons: SingleFlightCache[str] = SingleFlightCache(256)


def may_be_expensive(grammar: str) -> bool:
    """Whether a grammar may take long to compile: it is large, or has what llguidance does not limit."""
    return len(grammar) > _CHEAP_CHARACTERS or any(word in grammar for word in _MAY_BE_EXPENSIVE)


def reason_against(grammar: str, check: Callable[[], None] = no_limits) -> str:
    """llguidance's error for a grammar, or why it is too expensive; '' if it can be compiled in this process.

    What may be expensive is compiled in a child process first. Raises what `check` does, which is called meanwhile, and
    BusyError where other processes leave that one too little time, or it cannot be started.
    """
    if not may_be_expensive(grammar) or not has_python():
        return ""
    digest = hashlib.sha256(grammar.encode()).digest()
    return _reasons.get(digest, lambda: _compile_in_child(grammar, check), check)


def _compile_in_child(grammar: str, check: Callable[[], None]) -> str:
    request = json.dumps({"grammar": grammar, "cpu_s": MAX_CPU_S, "bytes": MAX_MB * 10**6, "path": sys.path})
    try:
        ended = run([sys.executable, "-I", "-B", str(_PROGRAM)], timeout_s=_MAX_S, stdin=request.encode(), check=check)
    except OSError as error:
        raise BusyError(f"no process to try the constraint can be started: {error}", "try again later") from error
    if ended.code == 0 and ended.timeout_s is None:
        return ended.output.decode("utf-8", "replace")
    if ended.timeout_s is not None and sys.platform != "win32":
        # It had less than its CPU time, so this says nothing about the grammar; Windows limits the wall time alone.
        raise BusyError(f"trying the output constraint took over {_MAX_S:.0f} s", "try again later")
    _LOG.info("an output constraint is refused: compiling it in a child process %s", ended.how)
    return f"it {TOO_EXPENSIVE}: more than {MAX_CPU_S} s or {MAX_MB} MB"
