from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgetune_runtime.errors import (
    BusyError,
    EdgetuneError,
    NotFoundError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from sshd import Sshd, cut_ssh, free_port, needs_sshd

from edgetune.delivery.deploy.ssh import Connection
from edgetune.delivery.deploy.target import Target, parse_target, read_inventory


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("pi@raspberrypi.local", Target("pi@raspberrypi.local")),
        ("kitchen", Target("kitchen")),
        ("pi@192.168.1.20:2222", Target("pi@192.168.1.20", 2222)),
        ("pi@[fe80::1%eth0]:22", Target("pi@fe80::1%eth0", 22)),
    ],
)
def test_a_target_is_what_ssh_gets(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert str(target) == text


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "pi@-x", "pi@host:0", "pi@host:70000", "a b", "pi@h;x", "pi@"]
)
def test_what_ssh_could_take_for_something_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"not of the form USER@HOST\[:PORT\]"):
        parse_target(text)


def test_an_inventory_has_comments_and_no_board_twice(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("# kitchen\npi@10.0.0.5\n\npi@10.0.0.6:2222  # hall\n", encoding="utf-8")
    assert read_inventory(path) == [Target("pi@10.0.0.5"), Target("pi@10.0.0.6", 2222)]
    path.write_text("pi@10.0.0.5\n-x\npi@10.0.0.5\n", encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_inventory(path)
    assert [line.split(" ")[0] for line in str(error.value).splitlines()] == [f"{path}:2:", f"{path}:3:"]
    with pytest.raises(NotFoundError, match="cannot read"):
        read_inventory(tmp_path / "none")


@needs_sshd
def test_commands_get_their_words_and_input_as_they_are(sshd: Sshd) -> None:
    code = "import sys; print(sys.argv[1:], sys.stdin.read())"
    words = ["it's", "a b", "$HOME", "*", ""]
    with Connection(parse_target(sshd.target)) as board:
        assert board.run([sys.executable, "-c", code, *words], [b"in", b"put"]).strip() == f"{words} input"


@needs_sshd
def test_the_end_of_the_block_ends_the_shared_connection(sshd: Sshd) -> None:
    with Connection(parse_target(sshd.target)) as board:
        # The parent of a command on the board is the process of sshd for this connection.
        parents = {board.run(["sh", "-c", "echo $PPID"]) for _ in range(2)}
        check = [*board._words, "-O", "check", board.target.host]
        assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    assert len(parents) == 1
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0


@needs_sshd
@pytest.mark.parametrize(("code", "cls"), [(1, EdgetuneError), (3, NotFoundError), (7, BusyError)])
def test_a_failed_command_is_the_error_of_its_exit_code(sshd: Sshd, code: int, cls: type[EdgetuneError]) -> None:
    script = f"print('noise'); import sys; print('\\x1b[31mno space', file=sys.stderr); sys.exit({code})"
    with Connection(parse_target(sshd.target)) as board, pytest.raises(EdgetuneError) as error:
        board.run([sys.executable, "-c", script])
    assert type(error.value) is cls
    assert str(error.value) == f"{sshd.target}: [31mno space"


@needs_sshd
def test_another_host_key_is_refused_with_the_command_that_removes_the_old_one(sshd: Sshd) -> None:
    sshd.trust(sshd.public_key("other"))
    with Connection(parse_target(sshd.target)) as board, pytest.raises(VerificationError) as error:
        board.run(["true"])
    text = str(error.value)
    assert f"the host key is not the one in {sshd.known_hosts}:1" in text
    assert f"ssh-keygen -R '[127.0.0.1]:{sshd.port}'" in text
    assert "\n" not in text


@needs_sshd
def test_an_unknown_host_key_is_refused_and_never_accepted(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("")
    with (
        Connection(parse_target(sshd.target)) as board,
        pytest.raises(VerificationError, match="key is not known; run"),
    ):
        board.run(["true"])
    assert sshd.known_hosts.read_text() == ""


@needs_sshd
def test_a_refused_login_names_the_remedy_and_asks_for_no_password(sshd: Sshd) -> None:
    problem = "login was refused; deploy needs a key"
    with (
        Connection(Target("nobody-here@127.0.0.1", sshd.port)) as board,
        pytest.raises(UnreachableError, match=problem),
    ):
        board.run(["true"])


@needs_sshd
def test_a_port_without_sshd_is_named(sshd: Sshd) -> None:
    port = free_port()
    problem = rf"pi@127.0.0.1:{port}: ssh was refused; check the port"
    with Connection(Target("pi@127.0.0.1", port)) as board, pytest.raises(UnreachableError, match=problem):
        board.run(["true"])


@needs_sshd
def test_a_connection_that_is_cut_is_one_line(sshd: Sshd) -> None:
    def data() -> Iterator[bytes]:
        yield b"x"
        cut_ssh()
        yield b"y"

    with (
        Connection(parse_target(sshd.target)) as board,
        pytest.raises(UnreachableError, match="connection was lost; run the command again, it resumes"),
    ):
        board.run(["cat"], data())


def test_no_ssh_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnreachableError, match="ssh is not installed; Debian: apt install openssh-client"):
        Connection(Target("pi@host")).run(["true"])
