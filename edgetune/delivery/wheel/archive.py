"""The contents of the wheel of llama-cpp-python: Python files, compiled libraries and licences."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .wheel_file import wheel_bytes

PACKAGE = "llama_cpp"
LIBRARIES = f"{PACKAGE}/lib"
"""Where the wheel has its libraries, and where llama_cpp looks for them."""
BUILD = 2
"""The wheel's build number; a change of the flags or of the layout needs the next one."""


def wheel_name(version: str, tag: str) -> str:
    """The file name of the wheel. Installers prefer the highest build number of a version."""
    return f"llama_cpp_python-{version}-{BUILD}-{tag}.whl"


def write_wheel(out: Path, source: Path, libraries: Iterable[Path], *, version: str, tag: str, generator: str) -> None:
    """Write the wheel `out` from an unpacked source distribution and the libraries compiled from it."""
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in _python_files(source / PACKAGE)}
    files |= {f"{LIBRARIES}/{path.name}": path.read_bytes() for path in libraries}
    metadata = {f"licenses/{name}": path.read_bytes() for name, path in _licenses(source).items()}
    metadata["METADATA"] = (source / "PKG-INFO").read_bytes()
    head = f"Generator: {generator}\nRoot-Is-Purelib: false\nTag: {tag}\nBuild: {BUILD}\n"
    out.write_bytes(wheel_bytes(files, metadata, f"llama_cpp_python-{version}.dist-info", head, compressed=True))


def _python_files(package: Path) -> Iterable[Path]:
    return (path for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed")


def _licenses(source: Path) -> dict[str, Path]:
    llama = source / "vendor/llama.cpp"
    licenses = {"LICENSE.md": source / "LICENSE.md", "llama.cpp/LICENSE": llama / "LICENSE"}
    return licenses | {f"llama.cpp/{path.name}": path for path in sorted(llama.glob("licenses/LICENSE*"))}
