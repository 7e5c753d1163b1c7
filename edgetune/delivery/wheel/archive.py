"""Writes the wheel from Python files, compiled libraries and licences; the same contents give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = "llama_cpp"
LIBRARIES = f"{PACKAGE}/lib"
"""Where the wheel has its libraries, and where llama_cpp looks for them."""
BUILD = 1
"""The wheel's build number; a change of the flags or of the layout needs the next one."""
# The earliest time that a zip file can hold.
_TIME = (1980, 1, 1, 0, 0, 0)


def wheel_name(version: str, tag: str) -> str:
    """The file name of the wheel. Installers prefer the highest build number of a version."""
    return f"llama_cpp_python-{version}-{BUILD}-{tag}.whl"


def write_wheel(out: Path, source: Path, libraries: Iterable[Path], *, version: str, tag: str, generator: str) -> None:
    """Write the wheel `out` from an unpacked source distribution and the libraries compiled from it."""
    info = f"llama_cpp_python-{version}.dist-info"
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in _python_files(source / PACKAGE)}
    files |= {f"{LIBRARIES}/{path.name}": path.read_bytes() for path in libraries}
    last = {f"{info}/licenses/{name}": path.read_bytes() for name, path in _licenses(source).items()}
    last[f"{info}/METADATA"] = (source / "PKG-INFO").read_bytes()
    head = f"Wheel-Version: 1.0\nGenerator: {generator}\nRoot-Is-Purelib: false\nTag: {tag}\nBuild: {BUILD}\n"
    last[f"{info}/WHEEL"] = head.encode()
    # The specification recommends that the metadata come last in the archive.
    entries = dict(sorted(files.items())) | dict(sorted(last.items()))
    entries[f"{info}/RECORD"] = _record(entries, f"{info}/RECORD")
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)


def _python_files(package: Path) -> Iterable[Path]:
    return (path for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed")


def _licenses(source: Path) -> dict[str, Path]:
    llama = source / "vendor/llama.cpp"
    found = {"LICENSE.md": source / "LICENSE.md", "llama.cpp/LICENSE": llama / "LICENSE"}
    return found | {f"llama.cpp/{path.name}": path for path in sorted(llama.glob("licenses/LICENSE*"))}


def _record(entries: Mapping[str, bytes], own_name: str) -> bytes:
    lines = []
    for name, data in entries.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    return "\n".join([*lines, f"{own_name},,", ""]).encode()
