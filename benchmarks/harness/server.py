"""Starts `edgetune-run serve` for a bundle, and waits until it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers at `url`."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def serving(
    bundle: Path,
    options: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    log: IO[str] | None = None,
    within: Callable[[Sequence[str]], Sequence[str]] = list,
    limit: Callable[[int], None] | None = None,
) -> Iterator[ServerProcess]:
    """A server for the bundle; its process and those that it starts are killed at the end.

    `within` changes the command, and `limit` limits the process once it has started. Raises RuntimeError if the server
    does not start.
    """
    command = [sys.executable, "-m", "edgetune_runtime", "serve", str(bundle), "--port", "0", "--json", *options]
    process = subprocess.Popen(
        within(command),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    try:
        if limit:
            limit(process.pid)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {bundle} does not start; see {log.name if log else 'its messages'}")
        yield ServerProcess(process, json.loads(line)["url"])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
