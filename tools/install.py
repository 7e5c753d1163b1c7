"""Run pip install, llama.cpp's compiler beside its downloads, and print every ten seconds what is being done.

    python tools/install.py LOG [arguments of pip install]

Standard library only, for every Python version that edgetune supports. If a local project among the arguments needs
llama-cpp-python, one pip compiles it, without the libraries for images and for llama.cpp's own programs, while another
installs the project's other requirements. The last pip installs the arguments, repeats what the other could not do,
and reports its errors. The output goes to the file LOG; if pip fails, it is also printed, and the exit code is pip's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Self

REPORT_EVERY_S = 10
STOP_WITHIN_S = 10
# Output of pip and of llama.cpp's build at the start of a step, and the text that is printed for the step.
STEPS = (
    (re.compile(r"Collecting (?P<what>[\w.-]+)"), "finding and downloading packages: {what}"),
    (re.compile(r"Downloading (?P<what>[\w.-]+).* \((?P<size>[\d.]+ [kMG]B)\)"), "downloading {what}, {size}"),
    (re.compile(r"Building (?:wheel|editable) for (?P<what>[\w.-]+)"), "building {what}"),
    (re.compile(r"\[(?P<done>\d+)/(?P<total>\d+)\] "), "compiling llama.cpp, file {done} of {total}"),
    (re.compile(r"\[ *(?P<done>\d+)%\] "), "compiling llama.cpp, {done} %"),
    (re.compile(r"Installing collected packages"), "unpacking the packages"),
)
LLAMA = "llama-cpp-python"
# llama.cpp's own build, in place of llama-cpp-python's, which always builds the libraries for images and programs too.
LLAMA_SETTINGS = {
    "cmake.source-dir": "vendor/llama.cpp",
    "wheel.install-dir": "llama_cpp",
    "cmake.define.BUILD_SHARED_LIBS": "ON",
    "cmake.define.LLAMA_BUILD_COMMON": "OFF",
    "cmake.define.LLAMA_BUILD_APP": "OFF",
    "cmake.define.CMAKE_INSTALL_LIBDIR": "lib",
    "cmake.define.CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    # A wheel has no symbolic links: a library under three names would be there three times.
    "cmake.define.CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
}


class Pip:
    """A running `pip install` that appends its output to a file; leaving its `with` block stops it."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.step = "starting pip"
        # --verbose includes the output of the compiler. Python compiles what is imported, a small part, by itself.
        options = ("--verbose", "--progress-bar", "off", "--no-compile")
        command = [sys.executable, "-m", "pip", "install", *options, *arguments]
        # A group of its own, so that the compilers that pip starts can be stopped with it.
        self._process = subprocess.Popen(
            command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, encoding="utf-8", errors="replace", process_group=0
        )
        # Not Thread.join: after a Ctrl-C within it, the thread counts as ended.
        self._has_ended = threading.Event()
        threading.Thread(target=self._read, args=(log,), daemon=True).start()

    def _read(self, log: Path) -> None:
        assert self._process.stdout is not None
        with log.open("a", encoding="utf-8", errors="replace") as file:
            for line in self._process.stdout:
                file.write(line)
                self.step = step_of(line) or self.step
        self._has_ended.set()

    def wait(self, timeout_s: float) -> int | None:
        """The exit code; None if pip still runs after this time."""
        return self._process.wait() if self._has_ended.wait(timeout_s) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.wait(0) is None:
            # As Ctrl-C does, so that pip removes its temporary folders.
            os.killpg(self._process.pid, signal.SIGINT)
            self.wait(STOP_WITHIN_S)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def step_of(line: str) -> str | None:
    """The step that starts with this line of pip's output; None if no step does."""
    for pattern, text in STEPS:
        match = pattern.match(line.strip())
        if match:
            return text.format(**match.groupdict())
    return None


def requirements(argument: str) -> list[str]:
    """All requirements of the local project `FOLDER[extras]`; none if the argument names no local project."""
    folder, _, extras = argument.rstrip("]").partition("[")
    file = Path(folder, "pyproject.toml")
    if not file.is_file():
        return []
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    project = content["project"]
    hook = content["tool"]["hatch"].get("metadata", {}).get("hooks", {}).get("custom", {})
    found = [*project.get("dependencies", []), *hook.get("dependencies", [])]
    for extra in filter(None, extras.split(",")):
        for requirement in project["optional-dependencies"][extra]:
            is_own_extra = requirement.startswith(f"{project['name']}[")
            found += requirements(folder + requirement.removeprefix(project["name"])) if is_own_extra else [requirement]
    return found


def follow(start_s: float, *pips: Pip) -> int:
    """Print every ten seconds what `pips` do until the first one ends; returns its exit code."""
    while (code := pips[0].wait(REPORT_EVERY_S)) is None:
        steps = "; ".join(pip.step for pip in pips if pip.wait(0) is None)
        print(f"{elapsed(start_s)}  {steps}", flush=True)
    return code


def elapsed(start_s: float) -> str:
    """Minutes and seconds since the start."""
    minutes, seconds = divmod(round(time.monotonic() - start_s), 60)
    return f"{minutes:3d}:{seconds:02d}"


def install(log: Path, start_s: float, *arguments: str) -> int:
    """Run `pip install` with these arguments, after llama.cpp if they need it; returns pip's exit code."""
    needed = [requirement for argument in arguments for requirement in requirements(argument)]
    llama = [requirement for requirement in needed if requirement.startswith(LLAMA)]
    if llama:
        settings = [f"--config-settings={name}={value}" for name, value in LLAMA_SETTINGS.items()]
        others = [requirement for requirement in needed if requirement not in llama]
        with (
            Pip(log, "--no-deps", *settings, *llama) as compiling,
            Pip(log.with_suffix(".downloads.log"), *others) as downloading,
        ):
            code = follow(start_s, compiling, downloading)
            if code != 0:
                return code
            follow(start_s, downloading)
    with Pip(log, *arguments) as pip:
        return follow(start_s, pip)


def main(log_path: str, *arguments: str) -> int:
    """Run `pip install` with these arguments and report how it ended; returns pip's exit code."""
    start_s = time.monotonic()
    log = Path(log_path)
    log.write_text("", encoding="utf-8")
    code = install(log, start_s, *arguments)
    if code == 0:
        print(f"{elapsed(start_s)}  done")
    else:
        print(log.read_text(encoding="utf-8"), file=sys.stderr)
        print(f"pip failed after {elapsed(start_s).strip()}; its output is above and in {log}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # Both end the `with` blocks, and these the compilers. A shell starts what is in the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
