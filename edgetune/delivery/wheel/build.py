"""Builds the wheel of the host's llama-cpp-python version for another processor, and keeps it in the cache folder."""

from __future__ import annotations

import importlib.metadata
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from edgetune_export.base_file.llama_cpp_source import download_source
from edgetune_runtime.formats.atomic import replacing
from filelock import FileLock

from edgetune.progress import Progress

from .archive import BUILD, PACKAGE, wheel_name, write_wheel
from .compile import compile_libraries
from .platforms import platform_of
from .toolchain import find_toolchain

# Parts of the source distribution; without llama.cpp's tests, documents and models.
_LLAMA_PARTS = ("CMakeLists.txt", "LICENSE", "licenses/", "cmake/", "ggml/", "include/", "src/", "vendor/")
_PARTS = ("PKG-INFO", "LICENSE.md", f"{PACKAGE}/", *(f"vendor/llama.cpp/{part}" for part in _LLAMA_PARTS))


def cache_folder() -> Path:
    """The folder with the wheels; `pip install --find-links` with it takes them."""
    return Path(platformdirs.user_cache_dir("edgetune")) / "wheels"


def llama_wheel(platform: str, *, progress: Progress) -> Path:
    """The wheel for `platform`, a name in `PLATFORMS`: from edgetune's cache folder, or built with zig and kept there.

    The first build takes some minutes; a second process waits for the first. The same version, platform and compiler
    give the same bytes.

    Raises UsageError for an unknown platform, IncompatibleError if zig, CMake or Ninja is missing or the compiler
    fails, NotFoundError if pip cannot download the source.
    """
    target = platform_of(platform)
    version = importlib.metadata.version("llama-cpp-python")
    wheel = cache_folder() / wheel_name(version, target.tag)
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(wheel.with_suffix(".lock")):
        if wheel.is_file():
            return wheel
        toolchain = find_toolchain()
        with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="build-") as name:
            folder = Path(name)
            progress.say(f"downloading the source of llama-cpp-python {version}")
            source = _unpack(download_source(version, folder), folder)
            libraries = compile_libraries(
                source / "vendor/llama.cpp",
                folder / "build",
                target,
                toolchain,
                log=wheel.with_suffix(".log"),
                progress=progress,
            )
            generator = f"edgetune {BUILD} (zig {toolchain.version})"
            with replacing(wheel) as temporary:
                write_wheel(temporary, source, libraries, version=version, tag=target.tag, generator=generator)
    return wheel


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack what the wheel is made from; returns the folder of the source distribution."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, _members(tar, f"{root}/"), filter="data")
    return folder / root


def _members(tar: tarfile.TarFile, root: str) -> Iterator[tarfile.TarInfo]:
    return (member for member in tar if member.name.startswith(tuple(root + part for part in _PARTS)))
