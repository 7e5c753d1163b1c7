from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from edgetune_runtime.errors import IncompatibleError, UsageError
from typer.testing import CliRunner

from edgetune.cli.main import app
from edgetune.common.progress import Progress
from edgetune.delivery.wheel import toolchain
from edgetune.delivery.wheel.build import llama_wheel, wheel_name, write_wheel
from edgetune.delivery.wheel.platforms import PLATFORMS
from edgetune.delivery.wheel.toolchain import Toolchain, find_toolchain

QUIET = Progress(quiet=True)
PURE_TAG = "py3-none-any"
SOURCE = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 9.9\n",
    "LICENSE.md": "MIT",
    "llama_cpp/__init__.py": "__version__ = '9.9'\n",
    "llama_cpp/py.typed": "",
    "llama_cpp/server/app.py": "",
    "llama_cpp/notes.txt": "not for the wheel",
    "vendor/llama.cpp/LICENSE": "MIT",
    "vendor/llama.cpp/licenses/LICENSE-jsonhpp": "MIT",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source distribution, as far as the wheel is made from it, and one library."""
    root = tmp_path / "source"
    for name, text in SOURCE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "libllama.so").write_bytes(b"\x7fELF")
    return root


def make(out: Path, source: Path) -> Path:
    wheel = out / wheel_name("9.9", PURE_TAG)
    out.mkdir(exist_ok=True)
    write_wheel(wheel, source, [source / "libllama.so"], version="9.9", tag=PURE_TAG, generator="edgetune 1")
    return wheel


def test_a_wheel_has_the_package_its_libraries_and_the_licences_and_pip_installs_it(
    source: Path, tmp_path: Path
) -> None:
    wheel = make(tmp_path / "out", source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    installed = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*") if p.is_file()}
    assert {"llama_cpp/__init__.py", "llama_cpp/py.typed", "llama_cpp/server/app.py", "llama_cpp/lib/libllama.so"} <= (
        installed
    )
    assert "llama_cpp/notes.txt" not in installed
    licences = {name.partition("/licenses/")[2] for name in installed if "/licenses/" in name}
    assert licences == {"LICENSE.md", "llama.cpp/LICENSE", "llama.cpp/LICENSE-jsonhpp"}
    assert os.access(tmp_path / "site/llama_cpp/lib/libllama.so", os.X_OK)


def test_the_record_of_a_wheel_has_the_digest_of_each_file(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(make(tmp_path / "out", source)) as wheel:
        assert wheel.namelist()[-1].endswith("/RECORD")
        rows = [line.split(",") for line in wheel.read(wheel.namelist()[-1]).decode().splitlines()]
        assert [name for name, _, _ in rows] == wheel.namelist()
        for name, digest, size in rows[:-1]:
            data = wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={expected}", str(len(data)))


def test_the_same_contents_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first = make(tmp_path / "first", source).read_bytes()
    for path in source.rglob("*.py"):
        os.utime(path, (2e9, 2e9))
    assert make(tmp_path / "second", source).read_bytes() == first


def test_a_wheel_in_the_cache_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(IncompatibleError, match=r'needs zig.*pip install "edgetune\[wheel\]"'):
        llama_wheel("linux-aarch64", progress=QUIET)
    name = wheel_name(toolchain.importlib.metadata.version("llama-cpp-python"), PLATFORMS["linux-aarch64"].tag)
    kept = tmp_path / "edgetune/wheels" / name
    kept.touch()
    assert llama_wheel("linux-aarch64", progress=QUIET) == kept
    assert kept.name.endswith("-py3-none-manylinux_2_36_aarch64.whl")
    result = CliRunner().invoke(app, ["wheel", "--platform", "linux-aarch64", "--out", str(kept.parent)])
    assert (result.exit_code, result.stdout) == (0, f"{kept}\n")


def test_an_unknown_platform_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"no platform 'linux-arm64'; .*linux-aarch64"):
        llama_wheel("linux-arm64", progress=QUIET)


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(IncompatibleError, match="needs zig and CMake and Ninja, not installed here"):
        find_toolchain()


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is called through a shell script")
@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("-march=armv8-a", "-mcpu=generic+v8a"),
        ("-march=armv8.2-a+dotprod+fp16", "-mcpu=generic+v8_2a+dotprod+fullfp16"),
        ("-march=armv9.2-a+sve2+sme", "-mcpu=generic+v9_2a+sve2+sme"),
        ("-DNAME=a b", "-DNAME=a b"),
        ("-mavx2", "-mavx2"),
    ],
)
def test_the_compiler_gets_zigs_names_of_arm_architectures(given: str, passed: str, tmp_path: Path) -> None:
    zig = tmp_path / "a zig"
    zig.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    zig.chmod(0o755)
    scripts = Toolchain(zig, "cmake", "ninja", "0").write_scripts(tmp_path / "scripts", PLATFORMS["linux-aarch64"])
    told = subprocess.check_output([scripts["c++"], "-c", given], text=True).splitlines()
    assert told == ["c++", "-target", "aarch64-linux-gnu.2.36", "-c", passed]
