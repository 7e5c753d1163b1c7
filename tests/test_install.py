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
import fcntl, hashlib, json, os, pathlib, time, zipfile

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
        text = json.dumps(settings)
        digest = hashlib.sha256(text.encode()).hexdigest()
        wheel.writestr("settings.json", text)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", f"settings.json,sha256={digest},{len(text)}\\n")
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


def install(prefix: Path, environment: dict[str, str]) -> str:
    """Run the script in a virtual environment for the project beside it; returns all that pip printed."""
    # The project itself has no backend without a network, so the last pip fails, and the script prints its output.
    command = [str(prefix / "bin/python"), str(SCRIPT), str(prefix / "install.log"), str(prefix.parent)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr


def installed_settings(prefix: Path) -> dict[str, str]:
    """The settings that the installed llama-cpp-python was built with."""
    (file,) = prefix.glob("lib/*/site-packages/settings.json")
    settings: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return settings


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


def test_llama_cpp_is_compiled_once_with_the_settings_of_the_script_and_replaces_one_with_others(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    sdist(tmp_path)
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    settings = runpy.run_path(str(SCRIPT))["LLAMA_SETTINGS"]
    new, used = tmp_path / "new", tmp_path / "used"
    for prefix in (new, used):
        venv.create(prefix, with_pip=False, symlinks=True)
    output = install(new, environment)
    assert "Building wheel for llama-cpp-python" in output, output
    assert installed_settings(new) == settings
    pip_install = [str(used / "bin/python"), "-m", "pip", "install", "--config-settings=other=yes"]
    for _ in range(2):  # in an environment that the script has not seen, then in one where it installed its own
        again = [*pip_install, "--force-reinstall", "--no-cache-dir", "llama-cpp-python"]
        subprocess.run(again, env=environment, capture_output=True, check=True)
        assert installed_settings(used) == {"other": "yes"}
        output = install(used, environment)
        assert "Successfully installed llama-cpp-python-0.3.36" in output, output
        assert "Building wheel for llama-cpp-python" not in output
        assert installed_settings(used) == settings
    assert "Successfully installed" not in install(used, environment)


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
