"""An sshd that stands in for a board, and a tiny bundle to deploy."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgetune_runtime import Runtime
from kits import add_environment, make_environment
from runtime.bundles import Adapter, change_manifest, low_rank, write_bundle
from sshd import Sshd, running


@pytest.fixture(scope="session")
def running_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One sshd for all tests."""
    with running(tmp_path_factory.mktemp("sshd"), Path(sys.executable).parent) as sshd:
        yield sshd


@pytest.fixture
def sshd(running_sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A board that answers over ssh, with its host key known."""
    monkeypatch.setenv("PATH", f"{running_sshd.programs}{os.pathsep}{os.environ['PATH']}")
    running_sshd.trust(running_sshd.public_key("host"))
    return running_sshd


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The virtual environment of all boards."""
    return make_environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def prefix(tmp_path: Path, environment: Path) -> Path:
    """The folder of a board on which nothing is installed but the environment."""
    add_environment(environment, tmp_path / "board")
    return tmp_path / "board"


@pytest.fixture(scope="session")
def made_bundle(tiny_gguf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the adapter `reply` and its golden answer."""
    base = tiny_gguf("llama")
    made = write_bundle(tmp_path_factory.mktemp("bundle") / "home", base, {"reply": Adapter(low_rank(base, seed=1))})
    with Runtime.open(made, disk_mb=0) as runtime:
        answer = runtime.generate("turn on the lamp", adapter="reply", raw=True, max_tokens=4).text
    golden = {"gguf": {"prompt": "turn on the lamp", "answer": answer, "max_tokens": 4}}
    change_manifest(made, lambda raw: raw["adapters"]["reply"].update(golden=golden))
    return made


@pytest.fixture
def bundle(made_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `made_bundle` that a test may change."""
    shutil.copytree(made_bundle, tmp_path / "home")
    return tmp_path / "home"
