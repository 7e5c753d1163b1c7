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
# transformers.models.auto alone imports neither torch nor any of what loads a tokenizer.
_FORKS.set_forkserver_preload(["transformers.modeling_utils", "transformers.models.auto.tokenization_auto"])


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, **_: object
) -> subprocess.CompletedProcess[str]:
    """Run `python -P FILE …` or `python -P -m MODULE …`, and keep what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_main, args=(list(command[2:]), {**os.environ, **(env or {})}, files))
        process.start()
        process.join()
        assert process.exitcode is not None
        texts = [file.read_text(encoding="utf-8") for file in files]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _main(words: list[str], variables: Mapping[str, str], files: Sequence[Path]) -> None:
    # The server has those of the test that started it.
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, path in enumerate(files, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
