"""Install with pip, and say every ten seconds what it does and for how long it has run.

    python tools/install.py LOG [pip install's arguments]

Standard library only, for any Python that edgetune runs on. All that pip says goes to the file LOG; when pip fails it
is printed whole, and its exit code is this one's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

SAY_EVERY_S = 10
# What pip and, in it, the build of llama.cpp say when a step begins, and how the step is told here.
STEPS = (
    (re.compile(r"Collecting (?P<what>[\w.-]+)"), "finding and downloading packages: {what}"),
    (re.compile(r"Downloading (?P<what>[\w.-]+).* \((?P<size>[\d.]+ [kMG]B)\)"), "downloading {what}, {size}"),
    (re.compile(r"Building (?:wheel|editable) for (?P<what>[\w.-]+)"), "building {what}"),
    (re.compile(r"\[(?P<done>\d+)/(?P<total>\d+)\] "), "compiling llama.cpp, file {done} of {total}"),
    (re.compile(r"\[ *(?P<done>\d+)%\] "), "compiling llama.cpp, {done} %"),
    (re.compile(r"Installing collected packages"), "unpacking the packages"),
)


class Log:
    """pip's output, line by line into a file, and the step that it is at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = "starting pip"
        self.has_ended = threading.Event()
        self._began = time.monotonic()

    def keep(self, lines: Iterable[str]) -> None:
        """Write all `lines` to the file, and follow the steps in them."""
        with self.path.open("a", encoding="utf-8", errors="replace") as file:
            for line in lines:
                file.write(line)
                self.step = step_of(line) or self.step

    def say_now_and_then(self) -> None:
        """Print the step every ten seconds until the end."""
        while not self.has_ended.wait(SAY_EVERY_S):
            print(f"{self.elapsed()}  {self.step}", flush=True)

    def elapsed(self) -> str:
        """Minutes and seconds since the beginning."""
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        return f"{minutes:3d}:{seconds:02d}"


def step_of(line: str) -> str | None:
    """The step that a line of pip's output begins; None where it begins none."""
    for pattern, told in STEPS:
        match = pattern.match(line.strip())
        if match:
            return told.format(**match.groupdict())
    return None


def main(log_path: str, *arguments: str) -> int:
    """Run `pip install` with these arguments."""
    log = Log(Path(log_path))
    log.path.write_text("", encoding="utf-8")
    # --verbose passes on what the compiler's build says; without a terminal pip draws no bars.
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--progress-bar", "off", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as pip:
        assert pip.stdout is not None
        speaker = threading.Thread(target=log.say_now_and_then, daemon=True)
        speaker.start()
        log.keep(pip.stdout)
    log.has_ended.set()
    speaker.join()
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
