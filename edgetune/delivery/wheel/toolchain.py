"""The programs that build llama.cpp for another processor: zig as C and C++ compiler, CMake and Ninja."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from edgetune_runtime.errors import IncompatibleError

from .platforms import Platform

_INSTALL = 'run: pip install "edgetune[wheel]"'
# zig names ARM architectures differently from llama.cpp's build, which uses the names of gcc and clang.
_COMPILER = """#!/bin/sh
for argument; do
  shift
  case $argument in -march=armv*) argument=$(echo "$argument" | sed '
    s/-march=armv8-a/-mcpu=generic+v8a/
    s/-march=armv\\([0-9]*\\)\\.\\([0-9]*\\)-a/-mcpu=generic+v\\1_\\2a/
    s/+fp16/+fullfp16/')
  esac
  set -- "$@" "$argument"
done
exec {zig} {language} -target {target} "$@"
"""
_ARCHIVER = """#!/bin/sh
exec {zig} {language} "$@"
"""
_SCRIPTS = {"cc": _COMPILER, "c++": _COMPILER, "ar": _ARCHIVER, "ranlib": _ARCHIVER}


@dataclass(frozen=True)
class Toolchain:
    """Paths of the programs, and zig's version."""

    zig: Path
    cmake: str
    ninja: str
    version: str

    def write_scripts(self, folder: Path, platform: Platform) -> dict[str, Path]:
        """Write cc, c++, ar and ranlib for `platform` to `folder`, as CMake needs one program for each."""
        folder.mkdir()
        scripts = {name: folder / name for name in _SCRIPTS}
        for name, script in scripts.items():
            text = _SCRIPTS[name].format(zig=shlex.quote(str(self.zig)), language=name, target=platform.target)
            script.write_text(text, encoding="utf-8")
            script.chmod(0o755)
        return scripts


def find_toolchain() -> Toolchain:
    """The programs of this environment, or else of the system; IncompatibleError names those that are missing."""
    if sys.platform == "win32":
        raise IncompatibleError("a wheel for boards cannot be built on Windows", "use Linux, macOS or WSL")
    package = importlib.util.find_spec("ziglang")
    zig = Path(package.origin).with_name("zig") if package is not None and package.origin is not None else None
    cmake, ninja = _program("cmake"), _program("ninja")
    if zig is None or cmake is None or ninja is None:
        programs = {"zig": zig, "CMake": cmake, "Ninja": ninja}
        missing = " and ".join(name for name, path in programs.items() if path is None)
        raise IncompatibleError(f"building a wheel needs {missing}, not installed here", _INSTALL)
    return Toolchain(zig, cmake, ninja, importlib.metadata.version("ziglang"))


def _program(name: str) -> str | None:
    # The environment's own programs are not on PATH unless it is activated.
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
