"""Checks the wheels in this machine's cache, which `edgetune wheel` or `edgetune kit` built."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import greedy
import platformdirs
import pytest
from runtime.bundles import Adapter, low_rank, write_bundle

from edgetune.delivery.wheel.build import LIBRARIES, wheel_name
from edgetune.delivery.wheel.platforms import GLIBC, PLATFORMS

pytestmark = pytest.mark.slow

# Before a test gives edgetune another cache folder.
WHEELS = Path(platformdirs.user_cache_dir("edgetune")) / "wheels"
VARIANTS = {
    "linux-aarch64": {"armv8.0_1", "armv8.2_1", "armv8.2_2", "armv8.2_3"}
    | {"armv8.6_1", "armv8.6_2", "armv9.2_1", "armv9.2_2"},
    "linux-x86_64": {"x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell", "alderlake", "skylakex"}
    | {"cannonlake", "cascadelake", "icelake", "cooperlake", "zen4", "sapphirerapids"},
}
# Processors of qemu, which has no AVX-512, and the variant for each. numpy needs the instructions of the first.
EMULATED = {"Nehalem": "sse42", "SandyBridge": "sandybridge", "IvyBridge": "ivybridge", "Haswell": "haswell"}
QEMU = shutil.which("qemu-x86_64-static")
SHOW_VARIANT = """\
from edgetune_runtime.engines.gguf.ggml import cpu_backend
from edgetune_runtime.engines.gguf.llama import library

print(library().__file__, cpu_backend(library()).variant)
"""
# Machine numbers of the ELF format.
ELF_MACHINES = {"linux-aarch64": 183, "linux-x86_64": 62}
MOST_BYTES = 12_000_000
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}
# The largest page of a kernel for such boards; a Pi 5 has 16 KiB.
PAGE = {"linux-aarch64": 0x10000, "linux-x86_64": 0x1000}


@pytest.fixture(params=PLATFORMS)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Path]]:
    """A platform, and the unpacked libraries of its wheel."""
    name = request.param
    wheel = WHEELS / wheel_name(version("llama-cpp-python"), PLATFORMS[name].tag)
    if not wheel.is_file():
        pytest.skip(f"no wheel in the cache; `edgetune wheel --platform {name}` builds it in some minutes")
    assert wheel.stat().st_size <= MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    return name, {path.name: path for path in (tmp_path / LIBRARIES).iterdir()}


def test_a_built_wheel_has_each_library_once_and_each_variant(built: tuple[str, dict[str, Path]]) -> None:
    name, libraries = built
    variants = {f"libggml-cpu-{variant}.so" for variant in VARIANTS[name]}
    assert libraries.keys() == {"libggml-base.so", "libggml.so", "libllama.so"} | variants
    for path in libraries.values():
        assert int.from_bytes(path.read_bytes()[18:20], "little") == ELF_MACHINES[name]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing; Debian: apt install binutils")
def test_a_built_wheel_needs_nothing_but_the_c_library_of_debian_12(built: tuple[str, dict[str, Path]]) -> None:
    name, libraries = built
    for path in libraries.values():
        readelf = ["readelf", "--wide", "--dynamic", "--version-info", "--segments", path]
        text = subprocess.check_output(readelf, text=True)
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
        assert needed <= libraries.keys() | SYSTEM_LIBRARIES | {"ld-linux-aarch64.so.1"}
        assert max((2, int(minor)) for minor in re.findall(r"GLIBC_2\.(\d+)", text)) <= GLIBC
        assert "[$ORIGIN]" in text
        assert min(int(size, 16) for size in re.findall(r" LOAD .* (0x\w+)\n", text)) >= PAGE[name]


@pytest.mark.skipif(sys.platform != "linux", reason="a wheel for Linux")
def test_the_built_wheel_of_this_platform_loads_its_backend(
    built: tuple[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = built
    if name != f"linux-{platform.machine()}":
        pytest.skip(f"this machine is {platform.machine()}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[4] / 'runtime'}")
    place, variant = subprocess.check_output([sys.executable, "-c", SHOW_VARIANT], text=True).split()
    assert place.startswith(str(tmp_path))
    assert variant in VARIANTS[name]


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64-static is missing; Debian: apt install qemu-user-static")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="this Python is not for x86-64")
@pytest.mark.parametrize(("cpu", "variant"), EMULATED.items())
@pytest.mark.parametrize("built", ["linux-x86_64"], indirect=True)
def test_a_variant_answers_on_its_processor_as_here(
    cpu: str,
    variant: str,
    built: tuple[str, dict[str, Path]],
    tiny_source: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny_source("llama")
    bundle = write_bundle(tmp_path / "home", source.path, {"command": Adapter(low_rank(source.path, seed=1))})
    ask = [sys.executable, greedy.__file__, str(bundle), "gguf", "12"]
    here = json.loads(subprocess.check_output(ask, text=True))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[4] / 'runtime'}")
    emulated = [str(QEMU), "-cpu", cpu]
    found = subprocess.check_output([*emulated, sys.executable, "-c", SHOW_VARIANT], text=True).split()
    assert (Path(found[0]).is_relative_to(tmp_path), found[1]) == (True, variant)
    there = json.loads(subprocess.check_output([*emulated, *ask], text=True))
    greedy.require_same(here, there, cpu)
