from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools/install.py"


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
