"""An emulated arm64 board with a kit of each engine installed. Only `make test-arm64` runs these tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from arm64.board import SHARED, Board
from arm64.rootfs import missing, prepare
from edgetune_export.backends.base import Source
from runtime.bundles import Adapter, low_rank, write_both

from edgetune.common.progress import Progress
from edgetune.delivery.kit.make import KitOptions, make_kit

BUNDLE = Path(__file__).parents[2] / "build/smart-home"
"""What `make demo` builds; without it, a tiny random model takes its place."""
INSTALLER_CPU = "cortex-a72"


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave this folder out unless it is named: it needs root, and emulation takes many minutes."""
    return None if any("arm64" in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board that has nothing but Debian and its Python."""
    lacking = missing()
    if lacking:
        pytest.exit(f"the emulated board needs {'; and '.join(lacking)}", returncode=5)
    return Board(prepare(), tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="session")
def bundle(tiny_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle on the host, in both formats."""
    if BUNDLE.is_dir():
        return BUNDLE
    source = tiny_source("llama")
    adapters = {"one": Adapter(low_rank(source.path, seed=1)), "two": Adapter(low_rank(source.path, seed=2, rank=3))}
    return write_both(tmp_path_factory.mktemp("tiny") / "home", source, adapters)


@pytest.fixture(scope="session")
def installed(board: Board, bundle: Path) -> Callable[[str], str]:
    """`installed(engine)`: the folder on the board where the kit of this engine is installed, without a network."""

    @cache
    def install(engine: str) -> str:
        kit = board.shared / f"{engine}-kit"
        make_kit(bundle, "pi-4", kit, KitOptions("3.13", engine), Progress())
        prefix = f"{SHARED}/{engine}"
        board.run("sh", f"{SHARED}/{kit.name}/install.sh", "--prefix", prefix, cpu=INSTALLER_CPU)
        shutil.rmtree(kit)
        return prefix

    return install
