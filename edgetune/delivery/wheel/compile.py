"""Compiles llama.cpp's libraries with CMake and Ninja for another processor, with a CPU backend for each generation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, STDOUT

from edgetune_runtime.errors import IncompatibleError

from edgetune.common.progress import Progress, Step

from .platforms import Platform
from .toolchain import Toolchain

# Of edgetune's wheel and no other: without OpenMP, whose library a board may lack, without image input, the examples
# and the server, and without llamafile's matrix products. Those are for two rows or more and round otherwise than the
# ones for a single row, so drafts would change answers.
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_SYSTEM_NAME": "Linux",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "OFF",
    "GGML_LLAMAFILE": "OFF",
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # zig compiles its C++ library once for each set of flags that it links with, so link only the libraries.
    "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
    # A wheel has no symbolic links: a library under two names would be there twice, and be loaded twice.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_SHARED_LINKER_FLAGS": "-s",
    "CMAKE_MODULE_LINKER_FLAGS": "-s",
    # The repository around the build folder, if there is one, says nothing about llama.cpp.
    "GIT_EXE": "false",
    "GIT_EXECUTABLE": "false",
}
_STEP = re.compile(r"\[(?P<done>\d+)/(?P<total>\d+)\]")


def compile_libraries(
    source: Path, build: Path, platform: Platform, toolchain: Toolchain, *, log: Path, progress: Progress
) -> list[Path]:
    """The shared libraries of the llama.cpp checkout `source`, compiled for `platform` in the folder `build`.

    All output goes to the file `log`; IncompatibleError names it when the compiler fails.
    """
    scripts = toolchain.write_scripts(build, platform)
    # So that the libraries do not depend on the folder that they were built in.
    prefix_map = f"-ffile-prefix-map={source}=llama.cpp"
    options = _OPTIONS | {
        "CMAKE_MAKE_PROGRAM": toolchain.ninja,
        "CMAKE_SYSTEM_PROCESSOR": platform.processor,
        "CMAKE_C_COMPILER": str(scripts["cc"]),
        "CMAKE_CXX_COMPILER": str(scripts["c++"]),
        "CMAKE_AR": str(scripts["ar"]),
        "CMAKE_RANLIB": str(scripts["ranlib"]),
        "CMAKE_C_FLAGS": prefix_map,
        "CMAKE_CXX_FLAGS": prefix_map,
    }
    flags = [f"-D{name}={value}" for name, value in options.items()]
    tree = build / "tree"
    progress.say(f"configuring llama.cpp for {platform.name}")
    with log.open("w", encoding="utf-8") as file:
        configure = [toolchain.cmake, "-G", "Ninja", "-S", str(source), "-B", str(tree), *flags]
        status = subprocess.call(configure, stdout=file, stderr=STDOUT)
    status = status or _run_ninja([toolchain.ninja, "-C", str(tree)], log, f"compiling for {platform.name}", progress)
    if status != 0:
        message = f"llama.cpp cannot be compiled for {platform.name}: {_first_error(log)}"
        raise IncompatibleError(message, f"all output is in {log}")
    return sorted(tree.glob("bin/*.so"))


def _run_ninja(command: Sequence[str], log: Path, label: str, progress: Progress) -> int:
    """Run Ninja, append its output to `log` and report its steps; returns its exit code."""
    with log.open("a", encoding="utf-8") as file, ExitStack() as stack:
        ninja = stack.enter_context(
            subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, encoding="utf-8", errors="replace")
        )
        assert ninja.stdout is not None
        step: Step | None = None
        for line in ninja.stdout:
            file.write(line)
            match = _STEP.match(line)
            if match:
                step = step or stack.enter_context(progress.step(label, int(match["total"])))
                step.update(done=int(match["done"]))
    return ninja.returncode


def _first_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
