"""A child process that opens changed files, kind by kind: their bytes after their length in, a JSON line each out."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

LENGTH_BYTES = 8
NEXT_KIND = b"\xff" * LENGTH_BYTES
"""In place of a length: files of the next kind follow."""
READY = "ready"
"""The first outcome of a fork, with its process id."""
WORK = "EDGETUNE_FUZZ_WORK"
"""Variable with the folder for copies of the seeds."""
LIBRARIES = {
    "gguf": ("llama_cpp",),
    "template": ("llama_cpp",),
    "manifest": ("llama_cpp",),
    "state": ("llama_cpp",),
    "past": ("llama_cpp",),
    "session": ("llama_cpp",),
    "draft": ("llama_cpp",),
    "router": ("llama_cpp",),
    "similarity": ("llama_cpp",),
    "onnx": ("onnxruntime", "tokenizers"),
    "tokenizer": ("onnxruntime", "tokenizers"),
    "recipe": ("edgetune.recipe.model",),
    "model": ("edgetune.bases.folder_header",),
    "peft": ("peft", "edgetune.methods"),
    "tuf": ("tuf.ngclient",),
}
CASES_PER_FORK = 1000
"""A fork is replaced after so many cases, so that memory that native code loses does not add up."""
_WORN = 3
"""Exit code of a fork that is to be replaced."""
MEMORY_BYTES = 1_500_000_000
"""Address space that a case may add to what the worker has after its first file."""
SAME_LINE_KINDS = {"recipe", "answer-log"}
"""Kinds whose errors list all problems, one per line."""


def main() -> None:
    """Open the files of the kinds in the first argument, with the seeds in the folder of the second one.

    A fork does it, as libraries are slow to import: when a case has ended it, that is the outcome, and the next fork
    goes on, as it does after CASES_PER_FORK cases. Each kind has forks of its own.
    """
    kinds, seeds = sys.argv[1].split(","), Path(sys.argv[2])
    # What libraries print is not an outcome.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for kind in kinds:
        import_libraries(kind)
        while True:
            fork = os.fork()
            if not fork:
                os._exit(_run_cases(kind, seeds, answers))
            code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
            if code == 0:
                break
            if code != _WORN:
                _say({"outcome": signal.Signals(-code).name if code < 0 else f"exit {code}"}, answers)


def _run_cases(kind: str, seeds: Path, answers: TextIO) -> int:
    """Open files until there are no more of this kind, or it must be replaced; the exit code that says which."""
    from .kinds import opener  # noqa: PLC0415 - after standard output is out of the way

    # Not in the fork's memory alone: a fork that a case ends cannot remove it.
    with tempfile.TemporaryDirectory(dir=os.environ[WORK]) as work:
        valid, open_changed = opener(kind, seeds, Path(work))
        open_changed(valid)
        limit_memory()
        _say({"outcome": READY, "pid": os.getpid()}, answers)
        for _ in range(CASES_PER_FORK):
            length = _read(LENGTH_BYTES)
            if length in {b"", NEXT_KIND}:
                return 0
            changed = _read(int.from_bytes(length, "little"))
            os.lseek(2, 0, os.SEEK_SET)
            os.ftruncate(2, 0)
            _say(outcome_of(open_changed, changed, kind), answers)
    return _WORN


def import_libraries(kind: str) -> None:
    """Import what opening a file of this kind needs, without starting threads."""
    from . import kinds  # noqa: F401, PLC0415 - as above

    for name in LIBRARIES.get(kind.partition("-")[0], ()):
        import_module(name)


def _read(size: int) -> bytes:
    """So many bytes of standard input, fewer at its end; without a buffer, in which the next fork's case would be."""
    data = bytearray()
    while len(data) < size and (block := os.read(0, size - len(data))):
        data += block
    return bytes(data)


def _say(answer: Mapping[str, object], answers: TextIO) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def outcome_of(open_changed: Any, changed: bytes, kind: str) -> dict[str, str]:  # noqa: ANN401 - `kinds.Open`
    """What becomes of a changed file, as JSON values."""
    from edgetune_runtime.errors import EdgetuneError  # noqa: PLC0415 - as above

    try:
        open_changed(changed)
    except EdgetuneError as error:
        text = str(error)
        if "\x1b" in text or ("\n" in text and kind not in SAME_LINE_KINDS):
            cause = f"{_where(error)}: {type(error).__name__}"
            return {"outcome": "not one plain line", "cause": cause, "text": repr(text)[:200]}
        return {"outcome": "refused", "cause": text[:200]}
    except BaseException as error:
        # Also SystemExit, and PanicException of libraries in Rust, which is no Exception.
        return {"outcome": "raised", "cause": f"{_where(error)}: {type(error).__name__}", "text": str(error)[:200]}
    return {"outcome": "opened"}


def _where(error: BaseException) -> str:
    """The last line of edgetune's own code that raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "edgetune" in frame.filename and "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.name}" if frames else "?"


def limit_memory() -> None:
    """Limit the memory of this process to what it has now, and that of a case."""
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
