"""An emulated arm64 board with the runtime installed, and a bundle on it. Only `make test-arm64` runs these tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from arm64.board import Board
from arm64.rootfs import missing, prepare
from edgetune_export.backends.base import Source
from runtime.bundles import Adapter, add_onnx, low_rank, write_bundle

from edgetune.delivery.wheel import llama_wheel
from edgetune.progress import Progress

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build/smart-home"
"""What `make demo` builds; without it, a tiny random model takes its place."""
PYTHON = "/mnt/venv/bin/python"
_BOARDS_PYTHON = "3.13"
_GLIBC_MINORS = range(17, 37)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave this folder out unless it is named: it needs root, and emulation takes many minutes."""
    return None if any("arm64" in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board with a virtual environment in /mnt/venv, installed without a network."""
    lacking = missing()
    if lacking:
        pytest.exit(f"the emulated board needs {'; and '.join(lacking)}", returncode=5)
    shared = tmp_path_factory.mktemp("board")
    board = Board(prepare(), shared)
    _download(shared / "wheels")
    board.run("python3", "-m", "venv", "/mnt/venv", cpu="max")
    install = (PYTHON, "-m", "pip", "install", "--quiet", "--no-compile", "--no-index", "--find-links", "/mnt/wheels")
    board.run(*install, "edgetune-runtime[gguf,onnx]", cpu="max")
    return board


@pytest.fixture(scope="session")
def bundle(board: Board, tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle on the host; on the board it is /mnt/bundle. Both formats, one adapter or more."""
    made = BUNDLE if BUNDLE.is_dir() else _tiny_bundle(tiny_source("llama"), tmp_path_factory.mktemp("tiny") / "home")
    shutil.copytree(made, board.shared / "bundle")
    return made


def _tiny_bundle(source: Source, out: Path) -> Path:
    adapters = {"one": Adapter(low_rank(source.path, seed=1)), "two": Adapter(low_rank(source.path, seed=2, rank=3))}
    bundle = write_bundle(out, source.path, adapters)
    add_onnx(bundle, source, adapters)
    return bundle


def _download(folder: Path) -> None:
    """Put the runtime, its dependencies for aarch64 and edgetune's wheel of llama-cpp-python in `folder`."""
    folder.mkdir()
    shutil.copy(llama_wheel("linux-aarch64", progress=Progress()), folder)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT / "runtime")]
    subprocess.run(wheel, check=True)
    download = [*pip, "download", "--only-binary", ":all:", "--dest", str(folder), "--find-links", str(folder)]
    download += ["--python-version", _BOARDS_PYTHON, "--implementation", "cp", "--platform", "manylinux2014_aarch64"]
    # pip does not know that a newer C library runs what was built for an older one.
    for minor in _GLIBC_MINORS:
        download += ["--platform", f"manylinux_2_{minor}_aarch64"]
    subprocess.run([*download, "edgetune-runtime[gguf,onnx]"], check=True)
