"""A device with a kit whose bundle answers "zero", and a repository of that bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits import KitMaker
from repositories import Publisher, Server, serving

from edgetune.delivery.board import main as board


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with a kit whose bundle answers "zero"."""
    folder = tmp_path_factory.mktemp("kits")
    prefix = tmp_path_factory.mktemp("device") / "home"
    assert board.main(["install", str(KitMaker(folder)("zero")), "--prefix", str(prefix)]) == 0
    return prefix


@pytest.fixture
def prefix(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "device/home", symlinks=True))


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "host")


@pytest.fixture
def server(publisher: Publisher) -> Iterator[Server]:
    publisher("one")
    with serving(publisher.repo) as server:
        yield server
