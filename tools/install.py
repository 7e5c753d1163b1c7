"""Run pip install, and print every ten seconds what it is doing and the elapsed time.

    python tools/install.py LOG [arguments of pip install]

Standard library only, for every Python version that edgetune supports. pip's output goes to the file LOG; if pip fails,
it is also printed, and the exit code is pip's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

REPORT_EVERY_S = 10
# Output of pip and of llama.cpp's build at the start of a step, and the text that is printed for the step.
STEPS = (
    (re.compile(r"Collecting (?P<what>[\w.-]+)"), "finding and downloading packages: {what}"),
    (re.compile(r"Downloading (?P<what>[\w.-]+).* \((?P<size>[\d.]+ [kMG]B)\)"), "downloading {what}, {size}"),
    (re.compile(r"Building (?:wheel|editable) for (?P<what>[\w.-]+)"), "building {what}"),
    (re.compile(r"\[(?P<done>\d+)/(?P<total>\d+)\] "), "compiling llama.cpp, file {done} of {total}"),
    (re.compile(r"\[ *(?P<done>\d+)%\] "), "compiling llama.cpp, {done} %"),
    (re.compile(r"Installing collected packages"), "unpacking the packages"),
)


class Log:
    """Writes pip's output to a file and tracks the current step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = "starting pip"
        self.has_ended = threading.Event()
        self._start_s = time.monotonic()

    def write(self, lines: Iterable[str]) -> None:
        """Write `lines` to the file and update the step."""
        with self.path.open("a", encoding="utf-8", errors="replace") as file:
            for line in lines:
                file.write(line)
                self.step = step_of(line) or self.step

    def report(self) -> None:
        """Print the step every ten seconds until pip ends."""
        while not self.has_ended.wait(REPORT_EVERY_S):
            print(f"{self.elapsed()}  {self.step}", flush=True)

    def elapsed(self) -> str:
        """Minutes and seconds since the start."""
        minutes, seconds = divmod(round(time.monotonic() - self._start_s), 60)
        return f"{minutes:3d}:{seconds:02d}"


def step_of(line: str) -> str | None:
    """The step that starts with this line of pip's output; None if no step does."""
    for pattern, text in STEPS:
        match = pattern.match(line.strip())
        if match:
            return text.format(**match.groupdict())
    return None


def main(log_path: str, *arguments: str) -> int:
    """Run `pip install` with these arguments."""
    log = Log(Path(log_path))
    log.path.write_text("", encoding="utf-8")
    # --verbose includes the output of the compiler.
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--progress-bar", "off", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as pip:
        assert pip.stdout is not None
        reporter = threading.Thread(target=log.report, daemon=True)
        reporter.start()
        log.write(pip.stdout)
    log.has_ended.set()
    reporter.join()
    if pip.returncode != 0:
        print(log.path.read_text(encoding="utf-8"), file=sys.stderr)
        print(f"pip failed after {log.elapsed().strip()}; its output is above and in {log.path}", file=sys.stderr)
    else:
        print(f"{log.elapsed()}  done")
    return int(pip.returncode)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
