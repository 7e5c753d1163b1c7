"""Run pip install, llama.cpp's compiler beside its downloads, and print every ten seconds what is being done.

    python tools/install.py LOG [arguments of pip install]

Standard library only, for every Python version that edgetune supports. If a local project among the arguments needs
llama-cpp-python, it is installed first, without the libraries for images and for llama.cpp's own programs; one that
was compiled with other settings is replaced. While it compiles, another pip downloads the rest; what that one cannot
do, the last pip does and reports. The output goes to LOG and a second file beside it; if pip fails, it is also printed,
and the exit code is pip's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
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
# Python compiles what is imported, a small part, by itself.
INSTALL = ("install", "--no-compile")
# llama.cpp's own build, in place of llama-cpp-python's, which always builds the libraries for images and programs too.
LLAMA_SETTINGS = {
    "cmake.source-dir": "vendor/llama.cpp",
    "wheel.install-dir": "llama_cpp",
    "cmake.define.BUILD_SHARED_LIBS": "ON",
    # See docs/explanation/decoding.md: with them, drafts change answers.
    "cmake.define.GGML_LLAMAFILE": "OFF",
    "cmake.define.LLAMA_BUILD_COMMON": "OFF",
    "cmake.define.LLAMA_BUILD_APP": "OFF",
    "cmake.define.CMAKE_INSTALL_LIBDIR": "lib",
    "cmake.define.CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    # A wheel has no symbolic links: a library under three names would be there three times.
    "cmake.define.CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
}
SETTINGS_DIGEST = f"{zlib.crc32(repr(sorted(LLAMA_SETTINGS.items())).encode()):08x}"
# What this script installed in the environment: pip does not record the settings of a build.
BUILD_FILE = Path(sys.prefix, "llama-cpp-python.build")


class Pip:
    """A running pip that appends its output to a file; leaving its `with` block stops it."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.step = "starting pip"
        # --verbose includes the output of the compiler.
        command = [sys.executable, "-m", "pip", "--verbose", "--no-input", *arguments, "--progress-bar=off"]
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


def llama_requirement(arguments: Iterable[str]) -> str | None:
    """The requirement on llama-cpp-python of a local project `FOLDER[extras]` among the arguments, if there is one."""
    for argument in arguments:
        file = Path(argument.partition("[")[0], "pyproject.toml")
        match = re.search('"(llama-cpp-python[^"]*)"', file.read_text(encoding="utf-8")) if file.is_file() else None
        if match:
            return match[1]
    return None


def elapsed(start_s: float) -> str:
    """Minutes and seconds since the start."""
    minutes, seconds = divmod(round(time.monotonic() - start_s), 60)
    return f"{minutes:3d}:{seconds:02d}"


def own_cache() -> list[str]:
    """The option of pip for a cache that has only wheels of these settings, which pip's cache does not tell apart."""
    process = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=False)
    # Without a cache, pip says so and fails.
    return [f"--cache-dir={process.stdout.strip()}/edgetune-{SETTINGS_DIGEST}"] if process.returncode == 0 else []


def installed_build() -> str:
    """The settings of this script, with a checksum of the installed llama-cpp-python's list of files."""
    try:
        files = metadata.distribution("llama-cpp-python").read_text("RECORD") or ""
    except metadata.PackageNotFoundError:
        files = ""
    return f"{SETTINGS_DIGEST} {zlib.crc32(files.encode()):08x}"


def compile_llama(log: Path, start_s: float, requirement: str, arguments: Sequence[str]) -> int:
    """Install llama-cpp-python, and beside its compiler the wheels that the arguments need; returns pip's exit code."""
    settings = [f"--config-settings={name}={value}" for name, value in LLAMA_SETTINGS.items()]
    projects = [argument for argument in arguments if argument != "--editable"]
    beside = log.with_suffix(".downloads.log")
    is_current = BUILD_FILE.is_file() and BUILD_FILE.read_text(encoding="utf-8") == installed_build()
    options = ["--no-deps", *([] if is_current else ["--force-reinstall"]), *own_cache(), *settings]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        compiling = stack.enter_context(Pip(log, *INSTALL, *options, requirement))
        pips = [compiling]
        while (code := compiling.wait(REPORT_EVERY_S)) is None:
            if len(pips) == 1 and compiling.step.startswith("compiling"):
                pips.append(stack.enter_context(Pip(beside, "download", f"--dest={folder}", *projects)))
            report(start_s, *pips)
        while code == 0 and pips[-1].wait(REPORT_EVERY_S) is None:
            report(start_s, pips[-1])
        if code == 0 and (wheels := [str(path) for path in Path(folder).glob("*.whl")]):
            pips.append(stack.enter_context(Pip(beside, *INSTALL, "--no-deps", "--no-index", *wheels)))
            while pips[-1].wait(REPORT_EVERY_S) is None:
                report(start_s, pips[-1])
    if code == 0:
        BUILD_FILE.write_text(installed_build(), encoding="utf-8")
    return code


def install(log: Path, start_s: float, *arguments: str) -> int:
    """Run `pip install` with these arguments, after llama.cpp if they need it; returns pip's exit code."""
    requirement = llama_requirement(arguments)
    if requirement and (failure := compile_llama(log, start_s, requirement, arguments)) != 0:
        return failure
    with Pip(log, *INSTALL, *arguments) as pip:
        while (code := pip.wait(REPORT_EVERY_S)) is None:
            report(start_s, pip)
        return code


def report(start_s: float, *pips: Pip) -> None:
    """Print what the running ones of these do."""
    steps = "; ".join(pip.step for pip in pips if pip.wait(0) is None)
    print(f"{elapsed(start_s)}  {steps}", flush=True)


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
