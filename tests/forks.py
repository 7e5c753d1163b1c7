"""Runs Python programs as forks of a process that has imported torch and transformers, in place of `subprocess.run`.

As a program, llama.cpp's converter takes 3 s, nearly all of it for imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

DEVNULL = subprocess.DEVNULL
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["transformers.models.auto"])


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, **_: object
) -> subprocess.CompletedProcess[str]:
    """Run `python -P FILE …`; standard output is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "stderr")
        process = _FORKS.Process(target=_main, args=(list(command[2:]), dict(env or {}), said))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, "", said.read_text(encoding="utf-8"))


def _main(words: list[str], variables: Mapping[str, str], said: Path) -> None:
    os.environ.update(variables)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
