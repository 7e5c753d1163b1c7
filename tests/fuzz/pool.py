"""Runs cases in worker processes, and replaces one that a case ends or that does not answer in time."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .worker import CASES_PER_FORK, LENGTH_BYTES, NEXT_KIND, READY, WORK

TIMEOUT = "timeout"
CASE_S = 10.0
GUARDED_CASE_S = 60.0
"""For a case that ends a child process by its own limit of time."""
START_S = 120.0
_ABORT_S = 10.0
_TESTS = Path(__file__).parents[1]
_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RUST_BACKTRACE": "0",
    "GGML_NO_BACKTRACE": "1",
}
_TELLING = re.compile(r"ASSERT|what\(\)|panicked|terminate called")
_PYTHON = (" ", "Fatal Python", "Thread", "Current thread", "Extension modules")
_VARYING = re.compile(r"0x[0-9a-f]+|\d+|/\S+/")


CONTAINED = "contained"
"""What ends a worker, or hangs or raises in it, but is an error of one line where a child process opens it first."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `kind` is opened, refused, contained, or names a finding; `cause` groups equal ones."""

    kind: str
    cause: str = ""
    text: str = ""

    @property
    def is_finding(self) -> bool:
        """Whether the file did what no file may do."""
        return self.kind not in ("opened", "refused", CONTAINED)


def environment(work: Path, *, is_guarded: bool) -> dict[str, str]:
    """The variables of a process that opens files, which may write to the folder `work`."""
    path = os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")]))
    guard = {"EDGETUNE_CACHE": str(work / "cache"), "EDGETUNE_PREFLIGHT": str(int(is_guarded))}
    return {**os.environ, **_VARIABLES, **guard, WORK: str(work), "PYTHONPATH": path}


class Worker:
    """A worker process for some kinds of files, one after the other.

    It opens bundles without their check in a child process, which takes a second and would hide what the file does,
    unless it `is_guarded`, as an app is.
    """

    def __init__(self, kinds: Sequence[str], seeds: Path, *, is_guarded: bool = False) -> None:
        self._kinds, self._seeds, self._is_guarded = list(kinds), seeds, is_guarded
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in `close`
        self._work = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._count = self._fork = 0

    def run(self, data: bytes) -> Outcome:
        """Open a file with these bytes, which is of the first kind."""
        self._send(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        self._count += 1
        answer = self._answer(GUARDED_CASE_S if self._is_guarded else CASE_S)
        if answer is None:
            return self._hanging()
        if answer["outcome"].startswith(("SIG", "exit")):
            outcome = self._crash(answer["outcome"])
            self._expect_ready()
            return outcome
        return Outcome(answer["outcome"], answer.get("cause", ""), answer.get("text", ""))

    def next_kind(self) -> None:
        """Go on to files of the next kind, if there is one."""
        self._send(NEXT_KIND)
        del self._kinds[0]
        if self._kinds:
            self._expect_ready()

    def close(self) -> None:
        """End the process."""
        self._end()
        self._errors.close()
        self._work.cleanup()

    def _send(self, data: bytes) -> None:
        if self._process is None:
            self._start()
        elif self._count == CASES_PER_FORK:
            self._expect_ready()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _start(self) -> None:
        command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", ",".join(self._kinds), str(self._seeds)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(Path(self._work.name), is_guarded=self._is_guarded),
            start_new_session=True,
        )
        self._expect_ready()

    def _expect_ready(self) -> None:
        answer = self._answer(START_S)
        if answer is None or answer["outcome"] != READY:
            raise RuntimeError(f"the worker for {self._kinds[0]} does not open the valid file: {self._said()[-5:]}")
        self._fork, self._count = answer["pid"], 0

    def _answer(self, seconds: float) -> Any:  # noqa: ANN401 - the worker's JSON
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _hanging(self) -> Outcome:
        """Where the case that does not end is, and end it."""
        os.kill(self._fork, signal.SIGABRT)
        if self._answer(_ABORT_S) is None:
            self._end()
            return Outcome(TIMEOUT)
        outcome = self._crash(TIMEOUT)
        self._expect_ready()
        return outcome

    def _crash(self, name: str) -> Outcome:
        """What native code said last, and where Python called it."""
        lines = self._said()
        threads = [place for place, line in enumerate(lines) if line.startswith(("Thread", "Current thread"))]
        current = [place for place in threads if lines[place].startswith("Current")]
        # The last one is the main thread, which waits for what hangs.
        start = [*(threads[-1:] if name == TIMEOUT else current or threads), len(lines)][0]
        frames = [line.strip() for line in lines[start:] if line.lstrip().startswith("File ")]
        own = next((frame for frame in frames if "edgetune" in frame), (frames or [""])[0])
        said = [line for line in lines[:start] if not line.startswith(_PYTHON)]
        told = next((line for line in said if _TELLING.search(line)), ["", *said][-1])
        return Outcome(name, _VARYING.sub("*", f"{told[:150]} {own}"), told[:300])

    def _said(self) -> list[str]:
        self._errors.seek(0)
        return [line for line in self._errors.read().splitlines() if line.strip()]

    def _end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
