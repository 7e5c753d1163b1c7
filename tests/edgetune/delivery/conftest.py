"""An sshd that stands in for a board."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import Sshd, running


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the handlers that the board program sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def running_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One sshd for all tests."""
    with running(tmp_path_factory.mktemp("sshd"), str(Path(sys.executable).parent)) as sshd:
        yield sshd


@pytest.fixture
def sshd(running_sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A board that answers over ssh, with its host key known."""
    monkeypatch.setenv("PATH", f"{running_sshd.programs}{os.pathsep}{os.environ['PATH']}")
    running_sshd.trust(running_sshd.public_key("host"))
    return running_sshd
