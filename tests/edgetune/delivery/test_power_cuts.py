"""A command that is killed at any of its writes leaves the old or the new version running, and can be run again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from edgetune_runtime.store import versions
from edgetune_runtime.store.durable import LOCK_NAMES
from edgetune_runtime.store.kit import KIT_NAME, SUMS_NAME, read_kit
from kills import KILLED, killed_at, left_by_kills
from kits import KitMaker, answer_of, copied

from edgetune.delivery.board import main, transfer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="boards run Linux")]


def install_until(kit: Path, prefix: Path, kill_at: int, within: str) -> int:
    """Install as `run_until` does."""
    return run_until(("install", str(kit)), prefix, kill_at, within)


def run_until(words: Sequence[str], prefix: Path, kill_at: int, within: str, stdin: Path = Path(os.devnull)) -> int:
    """Run a command in a child process, killed at write `kill_at` of those whose path has `within`; its exit code."""

    def action() -> int:
        sys.stdin = stdin.open(encoding="utf-8")
        return main.main([*words, "--prefix", str(prefix)])

    return killed_at(kill_at, action, within)


def ask(prefix: Path, link: str = "current") -> str:
    """What a version answers."""
    version = prefix / link
    command = [version / "venv/bin/python", "-I", "-m", "edgetune_runtime", "ask", version / "bundle"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def answers(prefix: Path) -> tuple[str, str]:
    """What the current and the previous version would answer; asking them takes a process each."""
    folders = [prefix / link for link in ("current", "previous")]
    assert all(os.access(folder / "venv/bin/python", os.X_OK) for folder in folders)
    current, previous = ((folder / "bundle/answer.txt").read_text() for folder in folders)
    return current, previous


@pytest.fixture(scope="module")
def installed(prepare: Callable[[Path], Path], make: KitMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with the versions zero and one, so that the install of two has a version to remove."""
    prefix = prepare(tmp_path_factory.mktemp("board") / "home")
    for answer in ("zero", "one"):
        assert main.main(["install", str(make(answer)), "--prefix", str(prefix)]) == 0
    return prefix


def test_a_kill_at_any_write_leaves_a_version_running(installed: Path, make: KitMaker, tmp_path: Path) -> None:
    prefix, seen = copied(installed, tmp_path / "home"), []
    words = ["install", str(make("two")), "--prefix", str(prefix)]
    for _ in left_by_kills(lambda: main.main(words), prefix):
        seen.append(answer_of(prefix))
        assert main.main(words) == 0
        assert answers(prefix) == ("two", "one")
        assert len(list((prefix / "versions").iterdir())) == 2
    assert len(seen) > 30
    assert seen == sorted(seen) and set(seen) == {"one", "two"}


def test_a_kill_while_the_environment_is_made_leaves_the_old_version(
    installed: Path, make: KitMaker, tmp_path: Path
) -> None:
    kit = make("two", runtime="2")
    wheels = read_kit(kit).wheels
    prefix = copied(installed, tmp_path / "home")
    # Before it gets its name.
    assert install_until(kit, prefix, 2, within="complete") == KILLED
    assert ask(prefix) == "one"
    assert not (prefix / "venvs" / wheels / "complete").exists()
    assert main.main(["install", str(kit), "--prefix", str(prefix)]) == 0
    assert (ask(prefix), ask(prefix, "previous")) == ("two", "one")
    assert versions.linked(prefix, "current") == read_kit(kit).version


def test_a_rollback_that_is_killed_at_any_write_can_be_run_again(installed: Path, tmp_path: Path) -> None:
    prefix, seen = copied(installed, tmp_path / "home"), []
    words = ["rollback", "--prefix", str(prefix)]
    for is_killed in left_by_kills(lambda: main.main(words), prefix):
        seen.append(answer_of(prefix))
        assert not is_killed or main.main(words) == 0
        assert answers(prefix) == ("zero", "one")
        assert main.main(words) == 0
        assert answers(prefix) == ("one", "zero")
        assert not (prefix / ".rollback").is_symlink() and not (prefix / ".previous").is_symlink()
    assert len(seen) > 10
    assert seen == sorted(seen) and set(seen) == {"one", "zero"}


def test_a_kill_between_the_links_of_a_switch_leaves_a_version_to_go_back_to(
    installed: Path, make: KitMaker, tmp_path: Path
) -> None:
    kit = make("two")
    for within in ("/previous", "/.current.new", "/current", "/bin"):
        prefix = copied(installed, tmp_path / "home")
        assert install_until(kit, prefix, 1, within=within) == KILLED
        assert ask(prefix) == "one"
        assert versions.previous(prefix) is not None
        assert main.main(["rollback", "--prefix", str(prefix)]) == 0
        assert answers(prefix) == ("zero", "one")


def test_an_uninstall_that_is_killed_at_any_write_can_be_run_again(installed: Path, tmp_path: Path) -> None:
    prefix, codes = copied(installed, tmp_path / "home"), []
    words = ["uninstall", "--prefix", str(prefix)]
    for _ in left_by_kills(lambda: main.main(words), prefix):
        codes.append(main.main(words))
        # The last writes remove empty folders, after which nothing is installed.
        assert codes[-1] == 0 or not (prefix / versions.FOLDER).exists()
        assert not any(path.is_file() for path in prefix.rglob("*") if path.name not in LOCK_NAMES)
    assert len(codes) > 20
    assert not prefix.exists()


def test_a_transfer_that_is_killed_at_any_write_is_continued(installed: Path, make: KitMaker, tmp_path: Path) -> None:
    kit, stream, incoming = make("two"), tmp_path / "stream", tmp_path / "incoming"
    incoming.mkdir()
    for name in (KIT_NAME, SUMS_NAME):
        shutil.copy(kit / name, incoming)
    contents = {file.sha256: (kit / file.path).read_bytes() for file in read_kit(kit).version_files}

    def receive(prefix: Path, kill_at: int) -> int:
        """Send what the board lacks, as a deploy does."""
        lacking = transfer.missing(prefix, read_kit(kit))
        stream.write_bytes(b"".join(contents[digest][offset:] for digest, offset in lacking.items()))
        words = ("install", str(incoming), "--receive", read_kit(kit).version)
        return run_until(words, prefix, kill_at, within="/files/", stdin=stream)

    for kill_at in range(1, 100):
        prefix = copied(installed, tmp_path / "home")
        code = receive(prefix, kill_at)
        if code == 0:
            break
        assert code == KILLED
        assert receive(prefix, 0) == 0
        assert answer_of(prefix) == "two"
    assert ask(prefix) == "two"
    assert kill_at > 5
