"""Processes of a benchmark: each loads one setup, so that no two share memory, threads or the processor's caches."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

SPAWN = get_context("spawn")


class WorkerEndedError(Exception):
    """A process that ended without an answer, with its exit code."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"exit {code}")
        self.code = code


class Worker:
    """A process that calls `make(*arguments)`, and then the function that it returned, on demand.

    `make` is a function of a module, and what goes to and fro can be pickled. The process first enters the cgroup whose
    file of processes is `procs`.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: object, procs: Path | None = None) -> None:
        self._connection, other = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_answer, args=(other, procs, make, arguments))
        self._process.start()
        other.close()
        self.end()

    def begin(self, *arguments: object) -> None:
        """Start a call."""
        self._connection.send(arguments)

    def end(self) -> Any:  # noqa: ANN401 - whatever the function returns
        """Wait for the result of a call. Raises WorkerEndedError if the process ends before."""
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerEndedError(self._process.exitcode) from None

    def __call__(self, *arguments: object) -> Any:  # noqa: ANN401 - whatever the function returns
        """The result of one call."""
        self.begin(*arguments)
        return self.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def in_own_process(
    function: Callable[..., Any],
    *arguments: object,
    procs: Path | None = None,
) -> Any:  # noqa: ANN401 - whatever the function returns
    """The result of one call in a process of its own. Raises WorkerEndedError if it ends without one."""
    with Worker(partial, function, procs=procs) as worker:
        return worker(*arguments)


def _answer(
    connection: Connection, procs: Path | None, make: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    if procs:
        procs.write_text(str(os.getpid()))
    # Libraries print to standard output, which is for the results.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    call = make(*arguments)
    connection.send(None)
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        connection.send(call(*asked))
