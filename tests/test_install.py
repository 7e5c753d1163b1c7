from __future__ import annotations

import fcntl
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

import pip
import pytest

from edgetune.delivery.wheel import compile as delivered

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools/install.py"
# A build backend that needs nothing else; where it has no settings it runs until it is stopped.
BACKEND = """
import fcntl, json, os, pathlib, time, zipfile

def build_wheel(folder, settings=None, metadata=None):
    if not settings:
        with open(os.environ["STARTED"], "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("started")
            file.flush()
            time.sleep(600)
    name = "llama_cpp_python-0.3.36-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        info = "llama_cpp_python-0.3.36.dist-info"
        wheel.writestr("settings.json", json.dumps(settings))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
BUILD_SYSTEM = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
PROJECT = '[project]\nname = "home"\nversion = "1"\ndependencies = ["llama-cpp-python>=0.3"]\n'


def sdist(folder: Path) -> None:
    """Write a source distribution of llama-cpp-python whose build says what settings it was given."""
    metadata = "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n"
    files = {"pyproject.toml": BUILD_SYSTEM, "backend.py": BACKEND, "PKG-INFO": metadata}
    with tarfile.open(folder / "llama_cpp_python-0.3.36.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables with which pip takes packages from `tmp_path` and has a cache folder of its own."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/pip").symlink_to(Path(pip.__file__).parent)
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CACHE_DIR": str(tmp_path / "cache")}
    return {**os.environ, **settings, "PYTHONPATH": str(tmp_path / "modules"), "STARTED": str(tmp_path / "started")}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Collecting torch>=2.9\n", "finding and downloading packages: torch"),
        ("  Downloading torch-2.13.0-cp311.whl (187.2 MB)\n", "downloading torch-2.13.0-cp311.whl, 187.2 MB"),
        ("  Building wheel for llama-cpp-python (pyproject.toml): started\n", "building llama-cpp-python"),
        ("  [12/193] /usr/bin/g++ -DGGML_BUILD -c ggml.cpp\n", "compiling llama.cpp, file 12 of 193"),
        ("  [ 12%] Building CXX object ggml.cpp.o\n", "compiling llama.cpp, 12 %"),
        ("Installing collected packages: torch, peft\n", "unpacking the packages"),
        ("  -- Detecting CXX compile features\n", None),
    ],
)
def test_a_line_of_pip_tells_the_step(line: str, told: str | None) -> None:
    assert runpy.run_path(str(SCRIPT))["step_of"](line) == told


def test_a_failed_install_prints_all_that_pip_said_and_fails(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    command = [sys.executable, str(SCRIPT), str(log), "--no-index", "no-such-package-here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No matching distribution found for no-such-package-here" in done.stderr
    assert done.stderr.startswith(log.read_text(encoding="utf-8"))
    assert "pip failed after" in done.stderr.splitlines()[-1]


def test_an_install_says_how_long_it_took(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    command = [sys.executable, str(SCRIPT), str(log), "--no-index", "pip"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "done"
    assert "Requirement already satisfied: pip" in log.read_text(encoding="utf-8")


def test_llama_cpp_is_compiled_with_the_settings_of_the_script_and_once(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    sdist(tmp_path)
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    for number in range(2):
        venv.create(tmp_path / f"venv{number}", with_pip=False, symlinks=True)
        python = tmp_path / f"venv{number}/bin/python"
        # The project itself has no backend without a network, so the last pip fails.
        command = [str(python), str(SCRIPT), str(tmp_path / "install.log"), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "Successfully installed llama-cpp-python-0.3.36" in done.stderr, done.stderr
        assert ("Building wheel for llama-cpp-python" in done.stderr) == (number == 0)
    (given,) = tmp_path.glob("venv1/lib/*/site-packages/settings.json")
    assert json.loads(given.read_text()) == runpy.run_path(str(SCRIPT))["LLAMA_SETTINGS"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_install_leaves_no_compiler_behind(
    number: signal.Signals, tmp_path: Path, environment: dict[str, str]
) -> None:
    sdist(tmp_path)
    started = tmp_path / "started"
    command = [sys.executable, str(SCRIPT), str(tmp_path / "install.log"), "--target", str(tmp_path / "out")]
    with subprocess.Popen([*command, "llama-cpp-python"], env=environment) as install:
        while not (started.is_file() and started.read_text()):
            assert install.poll() is None
            time.sleep(0.05)
        install.send_signal(number)
        code = install.wait(60)
    assert code == 130
    # The lock of a process ends with it.
    with started.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_requirement_on_llama_cpp_is_that_of_the_runtime() -> None:
    requirement_of = runpy.run_path(str(SCRIPT))["llama_requirement"]
    assert requirement_of(["--editable", f"{ROOT}[demo]", "--editable", f"{ROOT}/runtime[gguf]"]).startswith(
        "llama-cpp-python>="
    )
    assert requirement_of(["--editable", f"{ROOT}[wheel]"]) is None


def test_the_libraries_are_those_of_the_wheel_for_boards() -> None:
    settings = runpy.run_path(str(SCRIPT))["LLAMA_SETTINGS"]
    defined = {name.removeprefix("cmake.define."): value for name, value in settings.items() if "define" in name}
    del defined["CMAKE_INSTALL_LIBDIR"]
    assert defined.items() <= delivered._OPTIONS.items()
