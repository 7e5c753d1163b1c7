"""Builds the wheel of the host's llama-cpp-python version for another processor, and keeps it in the cache folder."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterable
from pathlib import Path

from edgetune_export.base_file.cache import cache_folder, make_in_cache
from edgetune_export.base_file.llama_cpp_source import download_source, unpack_source
from edgetune_runtime.formats.atomic import replacing

from edgetune.common.progress import Progress
from edgetune.common.waiting_lock import waiting_lock

from .compile import compile_libraries
from .platforms import platform_of
from .toolchain import find_toolchain
from .wheel_file import wheel_bytes

PACKAGE = "llama_cpp"
LIBRARIES = f"{PACKAGE}/lib"
"""Where the wheel has its libraries, and where llama_cpp looks for them."""
BUILD = 2
"""The wheel's build number; a change of the flags or of the layout needs the next one."""
# Parts of the source distribution; without llama.cpp's tests, documents and models.
_LLAMA_PARTS = ("CMakeLists.txt", "LICENSE", "licenses/", "cmake/", "ggml/", "include/", "src/", "vendor/")
_PARTS = ("PKG-INFO", "LICENSE.md", f"{PACKAGE}/", *(f"vendor/llama.cpp/{part}" for part in _LLAMA_PARTS))


def wheel_folder() -> Path:
    """The folder with the wheels; `pip install --find-links` with it takes them."""
    return cache_folder() / "wheels"


def llama_wheel(platform: str, *, progress: Progress) -> Path:
    """The wheel for `platform`, a name in `PLATFORMS`: from edgetune's cache folder, or built with zig and kept there.

    The first build takes some minutes; a second process waits for the first. The same version, platform and compiler
    give the same bytes.

    Raises UsageError for an unknown platform, or a cache folder that cannot be written, IncompatibleError if zig, CMake
    or Ninja is missing or the compiler fails, NotFoundError if pip cannot download the source.
    """
    target = platform_of(platform)
    version = importlib.metadata.version("llama-cpp-python")
    wheel = wheel_folder() / wheel_name(version, target.tag)
    make_in_cache(wheel.parent)
    with waiting_lock(wheel.with_suffix(".lock"), progress):
        if wheel.is_file():
            return wheel
        toolchain = find_toolchain()
        with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="build-") as name:
            folder = Path(name)
            progress.say(f"downloading the source of llama-cpp-python {version}")
            source = unpack_source(download_source(version, folder), folder, _PARTS)
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


def wheel_name(version: str, tag: str) -> str:
    """The file name of the wheel. Installers prefer the highest build number of a version."""
    return f"llama_cpp_python-{version}-{BUILD}-{tag}.whl"


def write_wheel(out: Path, source: Path, libraries: Iterable[Path], *, version: str, tag: str, generator: str) -> None:
    """Write the wheel `out` from an unpacked source distribution and the libraries compiled from it."""
    paths = (path for path in (source / PACKAGE).rglob("*") if path.suffix == ".py" or path.name == "py.typed")
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
    files |= {f"{LIBRARIES}/{path.name}": path.read_bytes() for path in libraries}
    llama = source / "vendor/llama.cpp"
    licenses = {"LICENSE.md": source / "LICENSE.md", "llama.cpp/LICENSE": llama / "LICENSE"}
    licenses |= {f"llama.cpp/{path.name}": path for path in sorted(llama.glob("licenses/LICENSE*"))}
    metadata = {f"licenses/{name}": path.read_bytes() for name, path in licenses.items()}
    metadata["METADATA"] = (source / "PKG-INFO").read_bytes()
    head = f"Generator: {generator}\nRoot-Is-Purelib: false\nTag: {tag}\nBuild: {BUILD}\n"
    out.write_bytes(wheel_bytes(files, metadata, f"llama_cpp_python-{version}.dist-info", head, compressed=True))
