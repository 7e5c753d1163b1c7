from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
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
from waiting import wait_for

from edgetune.delivery.deploy import limited, replies
from edgetune.delivery.deploy.limited import LimitedProcess
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


@needs_sshd
@pytest.mark.parametrize("to", ["", " >&2"])
def test_a_board_that_prints_without_end_is_cut_off(sshd: Sshd, to: str) -> None:
    with (
        Connection(parse_target(sshd.target)) as board,
        pytest.raises(
            UnreachableError, match="a command on the board printed more than 1 MB; see what its login shell"
        ),
    ):
        board.run(["sh", "-c", f"yes{to}"])


@needs_sshd
def test_a_command_that_does_not_end_is_cut_off(sshd: Sshd) -> None:
    begin = time.monotonic()
    with Connection(parse_target(sshd.target)) as board:
        with pytest.raises(UnreachableError, match="did not end in 1 s"):
            board.run(["sleep", "60"], limit_s=1)
        with pytest.raises(UnreachableError, match="did not take a part of its input in 1 s"):
            board.run(["sleep", "60"], (b"x" * 10**6 for _ in range(100)), limit_s=1)
        with pytest.raises(UnreachableError, match="did not end in 1 s"):
            board.converse(["cat"], "ready", lambda _: (), limit_s=1)
    assert time.monotonic() < begin + 30


@needs_sshd
def test_a_command_may_take_long_over_its_input(sshd: Sshd) -> None:
    def slow() -> Iterator[bytes]:
        for _ in range(5):
            yield b"x"
            time.sleep(0.4)

    with Connection(parse_target(sshd.target)) as board:
        assert board.run(["wc", "-c"], slow(), limit_s=1).strip() == "5"


@pytest.mark.parametrize(
    ("limit", "takes"), [("_STALLED_S", "sleep 60"), ("_TRANSFER_S", "while read -N 65536 x; do sleep 0.1; done")]
)
def test_a_command_that_takes_its_input_too_slowly_is_cut_off(
    limit: str, takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, limit, 0.5)
    process = LimitedProcess(["bash", "-c", takes], 7200)
    begin = time.monotonic()
    with pytest.raises(BrokenPipeError):
        for _ in range(1000):
            process.write(b"x" * (1 << 18))
    process.kill()
    assert process.exceeded.startswith("did not take ")
    assert time.monotonic() < begin + 10


@needs_sshd
def test_what_a_board_prints_cannot_control_the_terminal(sshd: Sshd) -> None:
    with Connection(parse_target(sshd.target)) as board:
        assert board.run(["printf", r"\033]0;title\007\302\2332J\342\200\256"]) == "]0;title  2J"


@needs_sshd
def test_a_board_gets_no_use_of_the_users_keys(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = sshd.folder / "ssh_config"
    before = settings.read_text()
    with subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.DEVNULL) as agent:
        wait_for((tmp_path / "agent").exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        monkeypatch.setenv("DISPLAY", ":0")
        try:
            settings.write_text(f"{before}ForwardAgent yes\nForwardX11 yes\n")
            with Connection(parse_target(sshd.target)) as board:
                assert board.run(["sh", "-c", "echo agent=$SSH_AUTH_SOCK display=$DISPLAY"]) == "agent= display="
        finally:
            settings.write_text(before)
            agent.terminate()


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        (replies.version, {"version": "\x1b[2J0123456789abcd"}),
        (replies.version, [{"version": "0" * 16}]),
        (replies.version, {}),
        (replies.installed, {"version": "0" * 16, "changed": 1, "warnings": []}),
        (replies.installed, {"version": "0" * 16, "changed": True, "warnings": [5]}),
        (replies.versions, {}),
        (replies.versions, [5]),
        (replies.versions, [{"version": "0" * 16, "state": "\x1b", "bundle": "0" * 64, "engines": []}]),
        (replies.versions, [{"version": "0" * 16, "state": "", "bundle": "x", "engines": []}]),
        (replies.versions, [{"version": "0" * 16, "state": "", "bundle": "0" * 64, "engines": ["\x07"]}]),
        (partial(replies.missing, sizes={"0" * 64: 3}), {"0" * 64: 4}),
        (partial(replies.missing, sizes={"0" * 64: 3}), {"0" * 64: True}),
        (partial(replies.missing, sizes={"0" * 64: 3}), {"1" * 64: 0}),
        (partial(replies.missing, sizes={}), None),
    ],
)
def test_a_reply_of_another_form_is_refused(parse: Callable[[object], object], value: object) -> None:
    with pytest.raises(ValueError):
        parse(value)


def test_warnings_of_a_board_are_few_short_lines() -> None:
    reply = {"version": "0" * 16, "changed": True, "warnings": ["\x1b[2J" + "x" * 1000] * 1000}
    _, _, warnings = replies.installed(reply)
    assert len(warnings) == 5 and all(text.isprintable() and len(text) == 300 for text in warnings)


def test_no_ssh_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "ssh is not installed; Debian: apt install openssh-client"
    with Connection(Target("pi@host")) as connection, pytest.raises(UnreachableError, match=message):
        connection.run(["true"])
