"""The child process of `preflight`: opens a bundle, computes with the base and adapters, and writes how it went."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from edgetune_runtime import engines, errors
from edgetune_runtime.errors import EdgetuneError, error_to_report
from edgetune_runtime.processes.confinement import ProcessLimits, confine

from .preflight import DONE, ERROR, STEP, tried

if TYPE_CHECKING:
    from .runtime import Runtime

_PROMPT = "A"
_MAX_TOKENS = 16
"""The end of a prompt, which has the invocation of an activated LoRA; a whole system prompt takes a board seconds."""

Write = Callable[[str, object], None]


def main() -> NoReturn:
    """Read a request from standard input, and write a line of JSON before each step and at the end."""
    request = json.load(sys.stdin)
    # Native code writes to standard output too.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engines.__path__[:] = request["engines"]
    confine(ProcessLimits(**request["limits"]))

    def write(key: str, value: object) -> None:
        print(json.dumps({key: value}), file=lines, flush=True)

    _open(request["bundle"], request["options"], request["added"], write)
    # Without the end of Python and of the libraries, which takes time and may fail by itself.
    os._exit(0)


def _open(bundle: str, options: Mapping[str, Any], added: tuple[str, str] | None, write: Write) -> None:
    # After `confine`: libraries start threads.
    from .runtime import Runtime  # noqa: PLC0415

    def opened() -> Runtime:
        return Runtime.open(bundle, **options, contexts=1, cache_mb=0, disk_mb=0, adapters_mb=math.inf, preflight=False)

    write(STEP, "opening it")
    try:
        with opened() as runtime:
            if added is None:
                _compute(runtime, None, write)
                entries = tried(runtime.manifest, runtime.engine)
            else:
                # The bundle may have one of this name, which it replaces.
                if added[1] in runtime.adapters:
                    runtime.remove_adapter(added[1])
                name = runtime.add_adapter(*added)
                entries = [runtime.manifest.adapter(name)]
            for entry in entries:
                if added is not None or not entry.is_merged(runtime.engine):
                    _compute(runtime, entry.name, write)
        for entry in entries if added is None else ():
            if entry.is_merged(options["engine"]):
                # One at a time, as each is a full model.
                with opened() as runtime:
                    _compute(runtime, entry.name, write)
    except (EdgetuneError, PermissionError) as error:
        # A file of another user says nothing about the bundle.
        told = error_to_report(error)
        name = next(kind.__name__ for kind in type(told).__mro__ if hasattr(errors, kind.__name__))
        write(ERROR, {"name": name, "message": told.message, "remedy": told.remedy})
        return
    write(DONE, True)


def _compute(runtime: Runtime, name: str | None, write: Write) -> None:
    """Compute a few tokens with an adapter or the base; errors that a call would raise are left to the calls."""
    from .measuring import loaded_bundle  # noqa: PLC0415 - as above

    loaded = loaded_bundle(runtime)
    write(STEP, "computing with the base" if name is None else f"computing with adapter {name!r}")
    with suppress(EdgetuneError):
        if loaded.classifier is not None:
            runtime.embed(_PROMPT) if name is None else runtime.classify(_PROMPT, adapter=name)
            return
        context, active = loaded.context(name)
        tokens = context.engine.tokenizer.tokenize(_PROMPT)
        with suppress(EdgetuneError):
            tokens = list(loaded.call(_PROMPT, name).job.tokens)[-_MAX_TOKENS:]
        with context.hold():
            context.start(active, tokens)
            context.extend(tokens[-1:])
